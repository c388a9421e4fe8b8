//! What must hold, whatever happened: one file each.

pub mod agreement;
pub mod leases;
pub mod locks;
pub mod revisions;
