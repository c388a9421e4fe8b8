//! The page about a run.

use crate::record::{Deed, Line};
use crate::verdict::Judgement;

pub fn page(judgement: &Judgement, _lines: &[Line], _deeds: &[Deed]) -> String {
    format!("{judgement:?}")
}
