//! Pictures of what the members use.

use std::fmt::Write;

use super::{COLOURS, MARGIN, Page, WIDTH, seconds};
use crate::resources::Sample;

const HEIGHT: f64 = 90.0;
/// Between two samples of a member that follow each other the line is drawn, over longer gaps not.
const GAP_SECONDS: f64 = 12.0;

/// What is drawn, and one of what is called so much.
type Quantity = (&'static str, fn(&Sample) -> u64, f64, &'static str);

const QUANTITIES: [Quantity; 3] = [
    ("Resident memory", |s| s.memory_bytes, 1048576.0, " MiB"),
    ("File descriptors", |s| s.descriptors, 1.0, ""),
    ("Disk", |s| s.disk_bytes, 1048576.0, " MiB"),
];

impl Page {
    /// A line a member.
    pub(super) fn resources(&mut self, samples: &[Sample]) {
        let members = samples.iter().map(|s| s.member + 1).max().unwrap_or(0);
        if members == 0 {
            return;
        }
        let names: Vec<String> = (0..members).map(|m| format!("m{m} {}", colour_name(m))).collect();
        for (title, quantity, unit, name) in QUANTITIES {
            let most = samples.iter().map(quantity).max().unwrap_or(0).max(1) as f64;
            self.begin(&format!("{title}: {}", names.join(", ")), HEIGHT);
            self.label(12.0, &format!("{:.0}{name}", most / unit));
            self.label(12.0 + HEIGHT, "0");
            let y = 12.0 + HEIGHT;
            let _ = write!(
                self.html,
                "<line class=\"axis\" x1=\"{MARGIN}\" x2=\"{WIDTH}\" y1=\"{y}\" y2=\"{y}\"/>"
            );
            for member in 0..members {
                let mut line = String::new();
                let mut last = f64::NEG_INFINITY;
                for sample in samples.iter().filter(|s| s.member == member) {
                    let at = seconds(sample.at);
                    let pen = if at - last > GAP_SECONDS { 'M' } else { 'L' };
                    last = at;
                    let y = 12.0 + HEIGHT * (1.0 - quantity(sample) as f64 / most);
                    let _ = write!(line, "{pen}{:.1} {y:.1}", self.x(at));
                }
                let colour = COLOURS[member % COLOURS.len()];
                let _ = write!(
                    self.html,
                    "<path fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" d=\"{line}\"/>"
                );
            }
            self.end();
        }
    }
}

fn colour_name(member: usize) -> &'static str {
    ["blue", "orange", "green", "purple", "brown"][member % 5]
}
