//! A slow and simple model of the machine.
