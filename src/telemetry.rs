//! The log: one line an event, on standard error, in etcd's shape.
//!
//! ```text
//! {"level":"info","ts":"2026-01-31T12:00:00.250Z","caller":"node/lessor.rs:88","msg":"lease expired","lease":"4d"}
//! ```
//!
//! The fields of an event follow the four fixed keys; spans are not printed. A field whose name
//! speaks of a token or a password is printed without its value, whoever logged it.

use std::fmt::{self, Write as _};
use std::str::FromStr;
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::clock::Clock;

/// The least severe events that are logged, by etcd's names.
///
/// Nothing here is more severe than an error, and hiding why a member stops helps nobody: `Panic`
/// and `Fatal` log what `Error` logs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogLevel {
    Debug,
    #[default]
    Info,
    Warn,
    Error,
    Panic,
    Fatal,
}

impl LogLevel {
    fn filter(self) -> LevelFilter {
        match self {
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Warn => LevelFilter::WARN,
            LogLevel::Error | LogLevel::Panic | LogLevel::Fatal => LevelFilter::ERROR,
        }
    }
}

impl FromStr for LogLevel {
    type Err = ();

    fn from_str(text: &str) -> Result<LogLevel, ()> {
        Ok(match text {
            "debug" => LogLevel::Debug,
            "info" => LogLevel::Info,
            "warn" => LogLevel::Warn,
            "error" => LogLevel::Error,
            "panic" => LogLevel::Panic,
            "fatal" => LogLevel::Fatal,
            _ => return Err(()),
        })
    }
}

/// How a line is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    #[default]
    Json,
    /// Time, level, caller and message between tabs, then the fields as JSON.
    Console,
}

impl FromStr for LogFormat {
    type Err = ();

    fn from_str(text: &str) -> Result<LogFormat, ()> {
        match text {
            "json" => Ok(LogFormat::Json),
            "console" => Ok(LogFormat::Console),
            _ => Err(()),
        }
    }
}

/// Starts logging to standard error, for the rest of the process. `clock` gives the time of a line.
///
/// Our own events are logged from `level` on, those of libraries from warnings on at most.
///
/// # Errors
///
/// When the process already has a log. It keeps the one it has.
pub fn init(level: LogLevel, format: LogFormat, clock: Arc<dyn Clock>) -> Result<(), TryInitError> {
    let lines = tracing_subscriber::fmt::layer()
        .event_format(LineFormat { format, clock })
        .with_writer(std::io::stderr);
    tracing_subscriber::registry().with(targets(level)).with(lines).try_init()?;
    if level.filter() > STATIC_MAX_LEVEL {
        tracing::warn!(
            built_in = %STATIC_MAX_LEVEL,
            "this build cannot log at the level asked for; use a debug build"
        );
    }
    Ok(())
}

fn targets(level: LogLevel) -> Targets {
    Targets::new()
        .with_default(level.filter().min(LevelFilter::WARN))
        .with_target(env!("CARGO_CRATE_NAME"), level.filter())
        // It warns where there is no program `sync`; `storage/sled.rs` does that itself.
        .with_target("sled", level.filter().min(LevelFilter::ERROR))
}

struct LineFormat {
    format: LogFormat,
    clock: Arc<dyn Clock>,
}

impl<S, N> FormatEvent<S, N> for LineFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let mut parts = Parts {
            file: metadata.file().map(str::to_owned),
            line: metadata.line().map(u64::from),
            ..Parts::default()
        };
        event.record(&mut parts);
        let level = level_name(metadata.level());
        let time = Rfc3339(self.clock.wall_ms());
        let caller = parts.caller();
        match self.format {
            LogFormat::Json => {
                write!(writer, r#"{{"level":"{level}","ts":"{time}","caller":"#)?;
                writer.write_str(&json_string(&caller))?;
                writer.write_str(r#","msg":"#)?;
                writer.write_str(&json_string(&parts.message))?;
                if !parts.fields.is_empty() {
                    write!(writer, ",{}", parts.fields)?;
                }
                writer.write_str("}\n")
            }
            LogFormat::Console => {
                write!(writer, "{time}\t{level}\t{caller}\t{}", OneLine(&parts.message))?;
                if !parts.fields.is_empty() {
                    write!(writer, "\t{{{}}}", parts.fields)?;
                }
                writer.write_str("\n")
            }
        }
    }
}

/// What one event says, taken apart.
#[derive(Default)]
struct Parts {
    file: Option<String>,
    line: Option<u64>,
    message: String,
    /// `"name":value` pairs, comma-separated.
    fields: String,
}

impl Parts {
    /// The last two parts of the file's path and the line, as in `node/propose.rs:31`. The rest of
    /// the path only tells where the binary was built.
    fn caller(&self) -> String {
        let path = self.file.as_deref().unwrap_or("unknown");
        let start = path.rmatch_indices(['/', '\\']).nth(1).map_or(0, |(at, _)| at + 1);
        format!("{}:{}", &path[start..], self.line.unwrap_or(0))
    }

    fn add(&mut self, field: &Field, json: &str) {
        let name = field.name();
        let separator = if self.fields.is_empty() { "" } else { "," };
        // A second `level` or `ts` in one object would shadow the first in most JSON readers.
        let prefix = if matches!(name, "level" | "ts" | "caller" | "msg") { "field." } else { "" };
        let name = json_string(&format!("{prefix}{name}"));
        let json = if is_secret(field.name()) { r#""[redacted]""# } else { json };
        write!(self.fields, "{separator}{name}:{json}").expect("a String takes any write");
    }

    fn add_text(&mut self, field: &Field, text: String) {
        match field.name() {
            "message" => self.message = text,
            // Events that come through the `log` crate carry their place as fields.
            "log.file" => self.file = Some(text),
            "log.target" | "log.module_path" => {}
            _ => self.add(field, &json_string(&text)),
        }
    }
}

impl Visit for Parts {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add_text(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add_text(field, value.to_owned());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let mut text = value.to_string();
        let mut source = value.source();
        while let Some(cause) = source {
            write!(text, ": {cause}").expect("a String takes any write");
            source = cause.source();
        }
        self.add_text(field, text);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "log.line" {
            self.line = Some(value);
        } else {
            self.add(field, &value.to_string());
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, &value.to_string());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, if value { "true" } else { "false" });
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if value.is_finite() {
            self.add(field, &value.to_string());
        } else {
            self.add_text(field, value.to_string());
        }
    }
}

/// Milliseconds since the epoch, printed as RFC 3339 in UTC.
struct Rfc3339(u64);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rfc3339(ms) = *self;
        let (days, ms_of_day) = (ms / 86_400_000, ms % 86_400_000);
        // Years begin in March here, so that the leap day is a year's last and a month's first day
        // follows from its number alone.
        let days_since_march_of_year_0 = days + 719_468;
        let era = days_since_march_of_year_0 / 146_097;
        let day_of_era = days_since_march_of_year_0 % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
            ms_of_day / 3_600_000,
            ms_of_day / 60_000 % 60,
            ms_of_day / 1_000 % 60,
            ms_of_day % 1_000
        )
    }
}

/// Text with its control characters escaped, so that nothing logged can forge a line.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            if character.is_control() {
                write!(f, "{}", character.escape_default())?;
            } else {
                f.write_char(character)?;
            }
        }
        Ok(())
    }
}

fn level_name(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG | Level::TRACE => "debug",
    }
}

fn is_secret(field_name: &str) -> bool {
    ["token", "password", "secret", "authorization"].iter().any(|word| field_name.contains(word))
}

fn json_string(text: &str) -> String {
    serde_json::to_string(text).expect("every string has a JSON form")
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use super::*;
    use crate::clock::ManualClock;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What `log` writes, at 2024-02-29T23:59:59.007Z.
    fn logged(level: LogLevel, format: LogFormat, log: impl FnOnce()) -> String {
        let lines = Lines::default();
        let clock = Arc::new(ManualClock::at_wall_ms(1_709_251_199_007));
        let writer = lines.clone();
        let layer = tracing_subscriber::fmt::layer()
            .event_format(LineFormat { format, clock })
            .with_writer(move || writer.clone());
        let subscriber = tracing_subscriber::registry().with(targets(level)).with(layer);
        tracing::subscriber::with_default(subscriber, log);
        String::from_utf8(lines.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_json_line_has_the_four_keys_and_then_the_fields() {
        let line = logged(LogLevel::Info, LogFormat::Json, || {
            tracing::info!(
                member = %"4d",
                peers = 3u64,
                behind = -1i64,
                ready = true,
                share = 0.5,
                "ready to serve client requests"
            );
        });
        let (head, rest) = line.split_once(r#","caller":""#).unwrap();
        assert_eq!(head, r#"{"level":"info","ts":"2024-02-29T23:59:59.007Z""#);
        let (caller, rest) = rest.split_once('"').unwrap();
        assert!(caller.starts_with("src/telemetry.rs:"), "{caller}");
        assert_eq!(
            rest,
            concat!(
                r#","msg":"ready to serve client requests","#,
                r#""member":"4d","peers":3,"behind":-1,"ready":true,"share":0.5}"#,
                "\n"
            )
        );
        serde_json::from_str::<serde_json::Value>(&line).unwrap();
    }

    #[test]
    fn whatever_is_logged_stays_one_json_object_on_one_line() {
        let line = logged(LogLevel::Info, LogFormat::Json, || {
            tracing::warn!(
                key = "a\"b\nc\u{1}",
                level = "mine",
                msg = 7u64,
                ratio = f64::NAN,
                "two\nlines"
            );
        });
        assert_eq!(line.matches('\n').count(), 1);
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(object["level"], "warn");
        assert_eq!(object["msg"], "two\nlines");
        assert_eq!(object["key"], "a\"b\nc\u{1}");
        assert_eq!(object["field.level"], "mine");
        assert_eq!(object["field.msg"], 7);
        assert_eq!(object["ratio"], "NaN");
    }

    #[test]
    fn an_error_is_logged_with_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot sync the log")]
        struct Outer(#[source] io::Error);
        let line = logged(LogLevel::Info, LogFormat::Json, || {
            let error = Outer(io::Error::other("disk on fire"));
            tracing::error!(error = &error as &(dyn std::error::Error + 'static), "stopping");
        });
        assert!(line.contains(r#""error":"cannot sync the log: disk on fire""#), "{line}");
    }

    #[test]
    fn tokens_and_passwords_are_never_printed() {
        for format in [LogFormat::Json, LogFormat::Console] {
            let line = logged(LogLevel::Info, format, || {
                tracing::info!(auth_token = "hunter2.4", password = ?"hunter2", user = "u", "login");
            });
            assert!(!line.contains("hunter2"), "{line}");
            assert!(line.contains(r#""user":"u""#), "{line}");
        }
    }

    #[test]
    fn a_console_line_separates_its_columns_with_tabs() {
        let line = logged(LogLevel::Info, LogFormat::Console, || {
            tracing::info!(peers = 3u64, "ready\nforged line");
        });
        let columns: Vec<&str> = line.split('\t').collect();
        assert_eq!(columns[0], "2024-02-29T23:59:59.007Z");
        assert_eq!(columns[1], "info");
        assert!(columns[2].starts_with("src/telemetry.rs:"));
        assert_eq!(columns[3..], [r"ready\nforged line", "{\"peers\":3}\n"]);
    }

    #[test]
    fn libraries_are_heard_from_warnings_on() {
        let lines = logged(LogLevel::Debug, LogFormat::Json, || {
            tracing::info!("ours");
            tracing::info!(target: "openraft::core", "chatter");
            tracing::warn!(target: "openraft::core", "theirs");
        });
        assert!(lines.contains("ours") && lines.contains("theirs"), "{lines}");
        assert!(!lines.contains("chatter"), "{lines}");
    }

    #[test]
    fn a_level_hides_what_is_less_severe() {
        let lines = |level| {
            logged(level, LogFormat::Console, || {
                tracing::debug!("d");
                tracing::info!("i");
                tracing::warn!("w");
                tracing::error!("e");
                tracing::error!(target: "sled", "s");
            })
            .lines()
            .map(|line| line.rsplit('\t').next().unwrap().to_owned())
            .collect::<String>()
        };
        let can_debug = STATIC_MAX_LEVEL >= LevelFilter::DEBUG;
        assert_eq!(lines(LogLevel::Debug), if can_debug { "diwes" } else { "iwes" });
        assert_eq!(lines(LogLevel::Info), "iwes");
        assert_eq!(lines(LogLevel::Warn), "wes");
        for severe in [LogLevel::Error, LogLevel::Panic, LogLevel::Fatal] {
            assert_eq!(lines(severe), "es");
        }
    }

    #[test]
    fn times_are_printed_as_rfc_3339() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_709_251_200_000, "2024-03-01T00:00:00.000Z"),
            (1_767_225_599_999, "2025-12-31T23:59:59.999Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(Rfc3339(ms).to_string(), text);
        }
    }

    #[test]
    fn a_caller_does_not_tell_where_the_binary_was_built() {
        let caller = |file: &str| {
            Parts { file: Some(file.to_owned()), line: Some(9), ..Parts::default() }.caller()
        };
        assert_eq!(caller("src/node/propose.rs"), "node/propose.rs:9");
        assert_eq!(caller("/home/me/.cargo/sled-1.0.0/src/db.rs"), "src/db.rs:9");
        assert_eq!(caller("db.rs"), "db.rs:9");
        assert_eq!(Parts::default().caller(), "unknown:0");
    }
}
