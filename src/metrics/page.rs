//! The text format of Prometheus, version 0.0.4.

use std::fmt::{Display, Write};

use super::Histogram;

/// The content type of a [`Page`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// A page of metrics, written family by family.
#[derive(Debug, Default)]
pub struct Page {
    text: String,
}

/// The samples of one name.
pub struct Family<'a> {
    text: &'a mut String,
    name: &'static str,
}

impl Page {
    /// A family without labels.
    pub fn counter(&mut self, name: &'static str, help: &str, value: impl Display) {
        self.family(name, Kind::Counter, help).sample(&[], value);
    }

    /// A family without labels.
    pub fn gauge(&mut self, name: &'static str, help: &str, value: impl Display) {
        self.family(name, Kind::Gauge, help).sample(&[], value);
    }

    /// A family without labels.
    pub fn histogram(&mut self, name: &'static str, help: &str, histogram: &Histogram) {
        self.family(name, Kind::Histogram, help).histogram(&[], histogram);
    }

    /// A family whose samples follow. A name may be used for one family only.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) -> Family<'_> {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        line(&mut self.text, format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        Family { text: &mut self.text, name }
    }

    pub fn into_text(self) -> String {
        self.text
    }
}

impl Family<'_> {
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.write("", labels, value);
    }

    pub fn histogram(&mut self, labels: &[(&str, &str)], histogram: &Histogram) {
        let (bounded, sum, all) = histogram.cumulative();
        let mut with_bound = labels.to_vec();
        for (bound, below) in bounded {
            let bound = bound.to_string();
            with_bound.push(("le", &bound));
            self.write("_bucket", &with_bound, below);
            with_bound = labels.to_vec();
        }
        with_bound.push(("le", "+Inf"));
        self.write("_bucket", &with_bound, all);
        self.write("_sum", labels, sum);
        self.write("_count", labels, all);
    }

    fn write(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        line(self.text, format_args!("{}{suffix}", self.name));
        for (at, (label, value)) in labels.iter().enumerate() {
            let before = if at == 0 { '{' } else { ',' };
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            line(self.text, format_args!("{before}{label}=\"{value}\""));
        }
        let after = if labels.is_empty() { "" } else { "}" };
        line(self.text, format_args!("{after} {value}\n"));
    }
}

fn line(text: &mut String, what: std::fmt::Arguments<'_>) {
    text.write_fmt(what).expect("writing to a string does not fail");
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_page_is_what_prometheus_reads() {
        let histogram = Histogram::new(&[500, 1_000_000]);
        histogram.observe(Duration::from_micros(250));
        histogram.observe(Duration::from_millis(1_250));
        let mut page = Page::default();
        page.gauge("a_revision", "How far.", -1);
        let mut family = page.family("b_total", Kind::Counter, "How often.");
        family.sample(&[("who", "x\"y\\z"), ("to", "b")], 3_u64);
        family.sample(&[("who", "z"), ("to", "c")], 1.5);
        page.family("c_seconds", Kind::Histogram, "How long.").histogram(&[("k", "v")], &histogram);
        assert_eq!(
            page.into_text(),
            "# HELP a_revision How far.\n\
             # TYPE a_revision gauge\n\
             a_revision -1\n\
             # HELP b_total How often.\n\
             # TYPE b_total counter\n\
             b_total{who=\"x\\\"y\\\\z\",to=\"b\"} 3\n\
             b_total{who=\"z\",to=\"c\"} 1.5\n\
             # HELP c_seconds How long.\n\
             # TYPE c_seconds histogram\n\
             c_seconds_bucket{k=\"v\",le=\"0.0005\"} 1\n\
             c_seconds_bucket{k=\"v\",le=\"1\"} 1\n\
             c_seconds_bucket{k=\"v\",le=\"+Inf\"} 2\n\
             c_seconds_sum{k=\"v\"} 1.25025\n\
             c_seconds_count{k=\"v\"} 2\n"
        );
    }
}
