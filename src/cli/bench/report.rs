//! What a run prints.

use std::collections::BTreeMap;
use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

use super::Options;
use super::load::Measured;

/// The numbers of one run. The field names are the keys of `--json`.
#[derive(Debug, Serialize)]
pub struct Report {
    case: String,
    clients: u32,
    connections: usize,
    value_bytes: usize,
    seconds: f64,
    pub operations: u64,
    ops_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    p999_ms: f64,
    max_ms: f64,
    errors: u64,
    error_kinds: BTreeMap<String, u64>,
    /// Of the processes named by `--pids`.
    cpu_seconds_per_1000: Option<f64>,
    /// Of the generator itself.
    client_cpu_seconds_per_1000: Option<f64>,
    #[serde(flatten)]
    notes: BTreeMap<&'static str, f64>,
}

impl Report {
    pub fn new(options: &Options, connections: usize, measured: Measured) -> Report {
        let Measured { tally, open, cpu, notes } = measured;
        let seconds = open.as_secs_f64();
        let operations = tally.operations;
        let milliseconds = |quantile| tally.latencies.value_at_quantile(quantile) as f64 / 1_000.0;
        let per_1000 = |seconds: Option<f64>| {
            seconds.filter(|_| operations > 0).map(|seconds| seconds * 1_000.0 / operations as f64)
        };
        Report {
            case: options
                .case
                .to_possible_value()
                .map_or_else(String::new, |value| value.get_name().to_owned()),
            clients: options.clients,
            connections,
            value_bytes: options.value_size,
            seconds,
            operations,
            ops_per_second: if seconds > 0.0 { operations as f64 / seconds } else { 0.0 },
            p50_ms: milliseconds(0.5),
            p99_ms: milliseconds(0.99),
            p999_ms: milliseconds(0.999),
            max_ms: milliseconds(1.0),
            errors: tally.errors.total(),
            error_kinds: tally.errors.kinds,
            cpu_seconds_per_1000: per_1000(cpu.servers),
            client_cpu_seconds_per_1000: per_1000(cpu.client),
            notes,
        }
    }

    /// The report as one line.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("numbers and text are always valid JSON")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "{}: {} clients, {} connections, {} B values",
            self.case, self.clients, self.connections, self.value_bytes
        )?;
        writeln!(
            out,
            "  operations   {} in {:.2} s = {:.0} op/s",
            self.operations, self.seconds, self.ops_per_second
        )?;
        writeln!(
            out,
            "  latency ms   p50 {:.3}  p99 {:.3}  p99.9 {:.3}  max {:.3}",
            self.p50_ms, self.p99_ms, self.p999_ms, self.max_ms
        )?;
        writeln!(out, "  errors       {}", self.errors)?;
        for (kind, count) in &self.error_kinds {
            writeln!(out, "    {count} x {kind}")?;
        }
        let cpu = [
            ("servers", self.cpu_seconds_per_1000),
            ("generator", self.client_cpu_seconds_per_1000),
        ];
        for (who, seconds) in cpu {
            if let Some(seconds) = seconds {
                writeln!(out, "  CPU          {seconds:.4} s for 1,000 operations, {who}")?;
            }
        }
        for (name, number) in &self.notes {
            writeln!(out, "  {name} {number:.1}")?;
        }
        Ok(())
    }
}
