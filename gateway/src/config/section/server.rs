//! `version`, `[server]` and `[log]`.

use std::marker::PhantomData;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::Duration;

use super::super::constraints;
use super::super::fault::ConfigProblem;
use super::super::model::{LogConfig, ServerConfig};
use super::super::table_reader::TableReader;
use super::super::value_kind::{ArrayOf, DurationRange, IntegerRange, LabelWord, OneOf, ParsedString, Repeats};
use super::bounds::{HOUR, index, index_of};
use super::{files, formats};
use crate::http::target::{EncodedSlashPolicy, PathNormalisation, PathRules};
use crate::log::{AccessLogFormat, AccessLogTarget, LogField};

/// Version of the configuration format; a later version may change it.
pub(super) fn version(root: &TableReader<'_>) {
    root.required("version", &IntegerRange(1..=1));
}

pub(super) fn server(root: &TableReader<'_>) -> ServerConfig {
    let default = ServerConfig::default();
    root.table("server", |table| {
        let drain_timeout =
            table.value_or("drain_timeout", &DurationRange(Duration::ZERO..=HOUR), default.drain_timeout);
        ServerConfig {
            workers: index(table.value_or("workers", &IntegerRange(0..=1_024), index_of(default.workers))),
            node: table.value_or("node", &formats::NAME, default.node),
            zone: table.optional("zone", &formats::NAME).map(|zone| zone.value),
            drain_timeout,
            drain_idle: drain_idle(table, drain_timeout),
            upgrade_socket: upgrade_socket(table),
            paths: table.table("paths", |paths| path_rules(paths, default.paths)),
        }
    })
}

/// The default is shortened to the drain timeout.
fn drain_idle(table: &TableReader<'_>, drain_timeout: Duration) -> Duration {
    let default = ServerConfig::default().drain_idle;
    let value = table.value_or("drain_idle", &DurationRange(Duration::ZERO..=HOUR), default);
    if value > drain_timeout && table.has("drain_idle") {
        let problem = ConfigProblem::bad_value("`drain_idle` is longer than `drain_timeout`, which ends the drain");
        table.context.error(&table.location_of(&["drain_idle"]), problem.hint("raise `drain_timeout`"));
    }
    value.min(drain_timeout)
}

/// Longest path of the socket: the system allows 107 bytes, and a new socket has the number of its
/// process behind its name until it replaces the old one.
const SOCKET_PATH_MAX: usize = 98;

fn upgrade_socket(table: &TableReader<'_>) -> Option<PathBuf> {
    let path = files::optional_path(table, "upgrade_socket")?;
    let bytes = path.value.as_os_str().as_bytes();
    let problem = if path.value.file_name().is_none() {
        ConfigProblem::bad_value("the path names no file")
            .hint("write a path such as \"/run/tidegate/upgrade.sock\", or remove the key")
    } else if bytes.len() > SOCKET_PATH_MAX {
        let message = format!("the path has {} bytes; a socket may have {SOCKET_PATH_MAX}", bytes.len());
        ConfigProblem::bad_value(message).hint("choose a shorter directory, such as /run/tidegate")
    } else {
        return Some(path.value);
    };
    table.context.error(&path.at, problem);
    None
}

fn path_rules(table: &TableReader<'_>, default: PathRules) -> PathRules {
    const NORMALISE: OneOf<PathNormalisation> =
        OneOf(&[("on", Some(PathNormalisation::On)), ("off", Some(PathNormalisation::Off))]);
    const ENCODED_SLASH: OneOf<EncodedSlashPolicy> = OneOf(&[
        ("refuse", Some(EncodedSlashPolicy::Refuse)),
        ("keep", Some(EncodedSlashPolicy::Keep)),
        ("decode", Some(EncodedSlashPolicy::Decode)),
    ]);
    table.constraint(constraints::refused_by("encoded_slash", ("normalise", &["off"])));
    let rules = PathRules {
        normalise: table.value_or("normalise", &NORMALISE, default.normalise),
        encoded_slash: table.value_or("encoded_slash", &ENCODED_SLASH, default.encoded_slash),
    };
    if rules.normalise == PathNormalisation::Off && table.has("encoded_slash") {
        let problem = ConfigProblem::bad_value("`encoded_slash` has no effect with `normalise = \"off\"`");
        let hint = "remove it: paths then stay as received, encoded slashes included";
        table.context.error(&table.location_of(&["encoded_slash"]), problem.hint(hint));
    }
    rules
}

pub(super) fn log(root: &TableReader<'_>) -> LogConfig {
    const LEVELS: OneOf<tracing::Level> = OneOf(&[
        ("error", Some(tracing::Level::ERROR)),
        ("warn", Some(tracing::Level::WARN)),
        ("info", Some(tracing::Level::INFO)),
        ("debug", Some(tracing::Level::DEBUG)),
        ("trace", Some(tracing::Level::TRACE)),
    ]);
    const ACCESS: ParsedString<AccessLogTarget> = ParsedString {
        name: "\"stdout\", \"off\" or a file path",
        pattern: formats::NOT_EMPTY,
        parse: parse_access_log,
        format: format_access_log,
    };
    let default = LogConfig::default();
    root.table("log", |table| LogConfig {
        access: match table.value_or("access", &ACCESS, default.access) {
            AccessLogTarget::File(path) => AccessLogTarget::File(table.context.environment.base.join(path)),
            target => target,
        },
        format: log_format(table),
        level: table.value_or("level", &LEVELS, default.level),
    })
}

fn log_format(table: &TableReader<'_>) -> AccessLogFormat {
    const FORMATS: OneOf<bool> = OneOf(&[("json", Some(false)), ("combined", Some(true))]);
    const FIELD: LabelWord<LogField> = LabelWord { name: "a member of access log lines", label: PhantomData };
    // A JSON object has each member once. Without any, a line says nothing.
    const FIELDS: ArrayOf<LabelWord<LogField>> = ArrayOf { item: FIELD, min_items: 1, repeats: Repeats::Refused };
    table.constraint(constraints::refused_by("fields", ("format", &["combined"])));
    let is_combined = table.value_or("format", &FORMATS, false);
    let AccessLogFormat::Json(default) = AccessLogFormat::default() else { return AccessLogFormat::Combined };
    let fields = formats::values(table, "fields", &FIELDS, default);
    if is_combined && table.has("fields") {
        let problem = ConfigProblem::bad_value("lines in the combined format have no members to choose");
        table
            .context
            .error(&table.location_of(&["fields"]), problem.hint("remove `fields`, or set `format = \"json\"`"));
    }
    if is_combined { AccessLogFormat::Combined } else { AccessLogFormat::Json(fields) }
}

fn parse_access_log(text: &str) -> Result<AccessLogTarget, ConfigProblem> {
    match text {
        "stdout" => Ok(AccessLogTarget::Stdout),
        "off" => Ok(AccessLogTarget::Off),
        "" => Err(ConfigProblem::bad_value("the path is empty").hint("write \"off\" to disable the access log")),
        path => Ok(AccessLogTarget::File(path.into())),
    }
}

fn format_access_log(target: &AccessLogTarget) -> String {
    match target {
        AccessLogTarget::Stdout => "stdout".to_owned(),
        AccessLogTarget::Off => "off".to_owned(),
        AccessLogTarget::File(path) => path.display().to_string(),
    }
}

/// Sections whose feature is not available yet.
pub(super) fn unavailable(root: &TableReader<'_>) {
    root.unavailable("journal", None);
}
