//! The page about a run: one file of HTML with its pictures in it, and nothing from elsewhere.

mod resources;

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::time::Instant;

use holdfast_client_tests::holding::tenures;
use holdfast_client_tests::moment::micros;

use crate::record::{Deed, Line, Outcome, What, faults};
use crate::resources::Sample;
use crate::verdict::Judgement;
use crate::witness::{Told, held};

const WIDTH: f64 = 1100.0;
/// Left of every picture, for what its rows and values are called.
const MARGIN: f64 = 70.0;
/// Latencies are drawn from 0.1 ms to 100 s, a decade each.
const DECADES: f64 = 6.0;
const LATENCY_HEIGHT: f64 = 260.0;
const RATE_HEIGHT: f64 = 140.0;
/// The names of more faults than these would cover each other, and more seconds below.
const MOST_NAMES: usize = 60;
const MOST_STEPS: f64 = 24.0;
const ROW: f64 = 18.0;
/// Operations are counted over this time.
const BUCKET_MICROS: u64 = 500_000;

const COLOURS: [&str; 8] =
    ["#2f6fb0", "#d9822b", "#3b8f5a", "#a04a9c", "#8a6d3b", "#c0392b", "#3aa6a6", "#6b6bbd"];

const STYLE: &str = "body{font:14px/1.45 system-ui,sans-serif;margin:24px;max-width:1150px}\
    svg{display:block;margin:4px 0 22px}text{font-size:11px;fill:#444}h2{margin:18px 0 2px}\
    .fault{fill:#c0392b;opacity:.12}.axis{stroke:#bbb}table{border-collapse:collapse}\
    td{padding:1px 12px 1px 0;vertical-align:top}.bad{color:#b00020}";

/// The whole page.
pub fn page(judgement: &Judgement, lines: &[Line], deeds: &[Deed], samples: &[Sample]) -> String {
    let mut page = Page::new(deeds);
    page.head(judgement);
    page.latencies(lines);
    page.rates(lines);
    page.resources(samples);
    page.leaders(deeds);
    page.holds(lines);
    page.deeds(deeds);
    page.html
}

struct Page {
    html: String,
    /// What the pictures are wide enough for.
    seconds: f64,
    /// When faults were there, and what they are called.
    faults: Vec<(String, f64, f64)>,
}

fn seconds(at: Instant) -> f64 {
    micros(at) as f64 / 1e6
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

impl Page {
    fn new(deeds: &[Deed]) -> Page {
        let faults = faults(deeds);
        let faults = faults
            .iter()
            .map(|(fault, from, to)| (format!("{fault:?}"), seconds(*from), seconds(*to)))
            .collect();
        let seconds = deeds.last().map_or(1.0, |d| seconds(d.at)).max(1.0);
        Page { html: String::new(), seconds, faults }
    }

    fn put(&mut self, text: &str) {
        self.html.push_str(text);
    }

    fn x(&self, seconds: f64) -> f64 {
        MARGIN + seconds.clamp(0.0, self.seconds) / self.seconds * (WIDTH - MARGIN - 10.0)
    }

    fn head(&mut self, judgement: &Judgement) {
        let title = escaped(&format!("{} {}", judgement.verdict, judgement.cell));
        let _ = write!(
            self.html,
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
             <style>{STYLE}</style><h1>{title}</h1><p>Seed {}; {:.0} operations a second before the \
             first of {} faults; {} acknowledged in all.</p>",
            judgement.seed, judgement.rate, judgement.faults, judgement.acknowledged
        );
        for (class, texts) in
            [("bad", &judgement.violations), ("bad", &judgement.invalid), ("", &judgement.facts)]
        {
            for text in texts {
                let _ = write!(self.html, "<p class=\"{class}\">{}</p>", escaped(text));
            }
        }
    }

    /// Begins a picture with the faults shaded and the seconds below.
    fn begin(&mut self, title: &str, height: f64) {
        let _ = write!(
            self.html,
            "<h2>{title}</h2><svg width=\"{WIDTH}\" height=\"{}\" role=\"img\">",
            height + 30.0
        );
        for (name, from, to) in self.faults.clone() {
            let (from, to) = (self.x(from), self.x(to));
            let name = if self.faults.len() > MOST_NAMES { "" } else { &name };
            let _ = write!(
                self.html,
                "<rect class=\"fault\" x=\"{from:.1}\" y=\"12\" width=\"{:.1}\" height=\"{height}\"/>\
                 <text x=\"{from:.1}\" y=\"9\">{name}</text>",
                (to - from).max(1.0)
            );
        }
        let steps = [5.0, 30.0, 60.0, 300.0, 600.0, 3600.0];
        let step = steps.into_iter().find(|s| self.seconds <= s * MOST_STEPS).unwrap_or(36_000.0);
        let mut at = 0.0;
        while at <= self.seconds {
            let x = self.x(at);
            let _ = write!(
                self.html,
                "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{at} s</text>",
                height + 26.0
            );
            at += step;
        }
    }

    fn label(&mut self, y: f64, text: &str) {
        let _ = write!(
            self.html,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            MARGIN - 6.0,
            y + 4.0,
            escaped(text)
        );
    }

    fn end(&mut self) {
        self.put("</svg>");
    }

    /// A point for each call, at its end; points that would cover each other are one.
    fn latencies(&mut self, lines: &[Line]) {
        self.begin("Latency: answered blue, refused orange, unknown red", LATENCY_HEIGHT);
        let y_of = |millis: f64| {
            let decade = (millis.max(0.1) / 0.1).log10().min(DECADES);
            12.0 + LATENCY_HEIGHT * (1.0 - decade / DECADES)
        };
        for (millis, text) in [
            (0.1, "0.1 ms"),
            (1.0, "1 ms"),
            (10.0, "10 ms"),
            (100.0, "100 ms"),
            (1e3, "1 s"),
            (1e4, "10 s"),
        ] {
            let y = y_of(millis);
            let _ = write!(
                self.html,
                "<line class=\"axis\" x1=\"{MARGIN}\" x2=\"{WIDTH}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
            );
            self.label(y, text);
        }
        let mut drawn = HashSet::new();
        for span in lines.iter().filter_map(Line::span) {
            let x = self.x(seconds(span.ended));
            let y = y_of(span.ended.saturating_duration_since(span.began).as_secs_f64() * 1e3);
            let colour = match span.outcome {
                Outcome::Done => COLOURS[0],
                Outcome::Refused => COLOURS[1],
                Outcome::Unknown => COLOURS[5],
            };
            if drawn.insert((x as i64, y as i64, colour)) {
                let (x, y) = (x as i64, y as i64);
                let _ = write!(
                    self.html,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"2\" height=\"2\" fill=\"{colour}\"/>"
                );
            }
        }
        self.end();
    }

    fn rates(&mut self, lines: &[Line]) {
        let mut done: BTreeMap<u64, usize> = BTreeMap::new();
        let mut unknown: BTreeMap<u64, usize> = BTreeMap::new();
        for span in lines.iter().filter_map(Line::span) {
            let bucket = micros(span.ended) / BUCKET_MICROS;
            let counts = if span.outcome == Outcome::Unknown { &mut unknown } else { &mut done };
            *counts.entry(bucket).or_default() += 1;
        }
        let a_second = 1e6 / BUCKET_MICROS as f64;
        let most = done.values().chain(unknown.values()).max().copied().unwrap_or(1) as f64;
        self.begin("Operations a second: answered blue, unknown red", RATE_HEIGHT);
        self.label(12.0, &format!("{:.0}/s", most * a_second));
        self.label(12.0 + RATE_HEIGHT, "0");
        for (counts, colour) in [(&done, COLOURS[0]), (&unknown, COLOURS[5])] {
            let last = (self.seconds * a_second) as u64;
            let mut points = String::new();
            for bucket in 0..=last {
                let count = counts.get(&bucket).copied().unwrap_or(0) as f64;
                let x = self.x((bucket as f64 + 0.5) / a_second);
                let y = 12.0 + RATE_HEIGHT * (1.0 - count / most);
                let _ = write!(points, "{x:.1},{y:.1} ");
            }
            let _ = write!(
                self.html,
                "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{points}\"/>"
            );
        }
        self.end();
    }

    /// A row a member: whom it took for the leader.
    fn leaders(&mut self, deeds: &[Deed]) {
        let mut rows: BTreeMap<usize, Vec<(f64, Option<usize>, u64)>> = BTreeMap::new();
        for deed in deeds {
            if let What::Leads { by, leader, term } = &deed.what {
                rows.entry(*by).or_default().push((seconds(deed.at), *leader, *term));
            }
        }
        self.begin("Who leads, as each member says", ROW * rows.len() as f64);
        for (row, (member, changes)) in rows.into_iter().enumerate() {
            let y = 12.0 + ROW * row as f64;
            self.label(y + ROW / 2.0, &format!("m{member}"));
            for (at, (from, leader, term)) in changes.iter().enumerate() {
                let to = changes.get(at + 1).map_or(self.seconds, |next| next.0);
                let Some(leader) = leader else { continue };
                let text = format!("m{leader} in term {term}");
                self.bar((*from, to), y, COLOURS[leader % COLOURS.len()], &text);
            }
        }
        self.end();
    }

    /// A bar with its text on it where there is room, and to be read in any case.
    fn bar(&mut self, (from, to): (f64, f64), y: f64, colour: &str, text: &str) {
        let (from, to) = (self.x(from), self.x(to));
        let (width, text) = ((to - from).max(0.7), escaped(text));
        let _ = write!(
            self.html,
            "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\" \
             opacity=\".75\"><title>{text}</title></rect>",
            ROW - 4.0
        );
        if width > 7.0 * text.len() as f64 {
            let _ = write!(
                self.html,
                "<text x=\"{:.1}\" y=\"{:.1}\">{text}</text>",
                from + 3.0,
                y + ROW - 7.0
            );
        }
    }

    /// A row a lock: who held it.
    fn holds(&mut self, lines: &[Line]) {
        let told: Vec<&Told> = lines.iter().filter_map(Line::told).collect();
        let tenures = tenures(&held(&told));
        if tenures.is_empty() {
            return;
        }
        let mut names: Vec<&str> = tenures.iter().map(|t| t.name.as_str()).collect();
        names.dedup();
        self.begin("Who held each lock, or led each election", ROW * names.len() as f64);
        for (row, name) in names.iter().enumerate() {
            let y = 12.0 + ROW * row as f64;
            self.label(y + ROW / 2.0, name);
            for (at, tenure) in tenures.iter().filter(|t| t.name == *name).enumerate() {
                let from = seconds(tenure.from.1);
                let to = tenure.until.map_or(self.seconds, |until| seconds(until.1));
                let text = format!("{} with token {}", tenure.key, tenure.token);
                self.bar((from, to), y, COLOURS[at % 2], &text);
            }
        }
        self.end();
    }

    fn deeds(&mut self, deeds: &[Deed]) {
        self.put("<h2>What was done</h2><table>");
        for deed in deeds.iter().filter(|d| !matches!(d.what, What::Leads { .. })) {
            let what = serde_json::to_string(&deed.what).expect("it is plain data");
            let at = seconds(deed.at);
            let _ = write!(self.html, "<tr><td>{at:.2} s</td><td>{}</td></tr>", escaped(&what));
        }
        self.put("</table></html>\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_record_cannot_become_markup() {
        assert_eq!(escaped("<b>&</b>"), "&lt;b&gt;&amp;&lt;/b&gt;");
    }
}
