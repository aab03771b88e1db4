//! The `tidegate` command: parses the arguments, loads a configuration and runs it.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use annotate_snippets::Renderer;
use clap::{Args, CommandFactory, Parser, Subcommand};
use gateway::config::{Config, ConfigDocument, ConfigReport, DocumentFormat, PrintOptions};
use gateway::credentials::{self, NewApiKey};
use gateway::purge::{PurgeOrder, PurgeTarget};
use gateway::server::{self, BoundAddresses, ConfigSource, StartError, StartMode};
use gateway::top::{self, TopTarget};
use gateway::{admin_client, demo, event};

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Caching reverse proxy and rate limiter
#[derive(Parser)]
#[command(name = "tidegate", version = version(), about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a demonstration with a built-in origin
    Demo(DemoArguments),
    /// Run the gateway
    Run(RunArguments),
    /// Check a configuration file without opening a socket or a log
    Check(CheckArguments),
    /// Print the effective configuration, or its JSON Schema
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Purge the cache of a running gateway and its fleet: a URL, a tag, or everything
    Purge(PurgeArguments),
    /// Show routes and endpoints of a running gateway in the terminal
    Top(TopArguments),
    /// Create an API key for a name, or hash an existing one
    Key(KeyArguments),
    /// Hash a password, read from standard input, as a line of a file of users
    Password { name: String },
    /// Print the completion script of a shell
    Completions { shell: clap_complete::Shell },
    /// Print the manual page of the program or of one of its commands, for `man -l -`
    Man {
        /// Name of a command, such as `run` or `config print`
        command: Vec<String>,
    },
}

#[derive(Args)]
struct DemoArguments {
    /// Address of the gateway
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Address of the admin page and metrics
    #[arg(long, default_value = "127.0.0.1:9900")]
    admin: SocketAddr,
    /// Print the access log, one line of JSON for each request
    #[arg(long)]
    access_log: bool,
}

#[derive(Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("source").required(true).args(["config", "upstream"]))]
struct RunArguments {
    /// Configuration file, TOML or JSON (by file extension)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Proxy to this upstream with default settings, without a configuration file
    #[arg(long, value_name = "URL")]
    upstream: Option<String>,
    /// Listen address, with --upstream [default: 127.0.0.1:8080]
    #[arg(long, conflicts_with = "config")]
    listen: Option<SocketAddr>,
    /// Address of the admin page and metrics, with --upstream [default: 127.0.0.1:9900]
    #[arg(long, conflicts_with = "config")]
    admin: Option<SocketAddr>,
    /// Take over from a running gateway without losing a request: it hands over its listening
    /// sockets and drains. SOCKET is its upgrade socket [default: `server.upgrade_socket`]
    #[arg(long, value_name = "SOCKET", num_args = 0..=1, require_equals = true, conflicts_with = "upstream")]
    upgrade: Option<Option<PathBuf>>,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print the effective value of each key of a configuration file, without secrets
    Print {
        /// Configuration file, TOML or JSON (by file extension)
        file: PathBuf,
        /// Also print the keys that the file does not have
        #[arg(long)]
        defaults: bool,
        /// Print where each value comes from
        #[arg(long)]
        origin: bool,
    },
    /// Print the JSON Schema of the configuration, for editors
    Schema,
}

#[derive(Args)]
struct CheckArguments {
    /// Configuration file, TOML or JSON (by file extension)
    file: PathBuf,
    /// Print the faults as JSON
    #[arg(long)]
    json: bool,
    /// Treat warnings as errors
    #[arg(long)]
    deny_warnings: bool,
}

#[derive(Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("target").required(true).multiple(true).args(["url", "tag", "all"]))]
struct PurgeArguments {
    /// A full URL with host and query; may be repeated
    #[arg(long, value_name = "URL")]
    url: Vec<String>,
    /// A surrogate key set by the origin; may be repeated
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// Every stored response
    #[arg(long, conflicts_with_all = ["url", "tag"])]
    all: bool,
    /// Soft purge: mark responses stale; they may be served during revalidation or if the origin
    /// fails
    #[arg(long)]
    soft: bool,
    /// Purge this node of the fleet only (its `server.node`)
    #[arg(long)]
    node: Option<String>,
    /// Admin address of the gateway, or the URL of its dashboard
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9900", value_parser = admin_client::parse_address)]
    admin: SocketAddr,
    /// Token of the admin address
    #[arg(long, env = "ADMIN_TOKEN", hide_env_values = true)]
    token: Option<String>,
}

#[derive(Args)]
struct TopArguments {
    /// Print one snapshot and exit, as without a terminal
    #[arg(long)]
    once: bool,
    /// Admin address of the gateway, or the URL of its dashboard
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9900", value_parser = admin_client::parse_address)]
    admin: SocketAddr,
    /// Token of the admin address
    #[arg(long, env = "ADMIN_TOKEN", hide_env_values = true)]
    token: Option<String>,
}

#[derive(Args)]
struct KeyArguments {
    /// Name of the holder, for limits, access lists and the access log
    name: String,
    /// User class of the holder, one of `[tiers]`
    #[arg(long)]
    tier: Option<String>,
    /// Hash the key on standard input instead of a new one
    #[arg(long)]
    stdin: bool,
}

/// The version, with the commit where it is known.
fn version() -> &'static str {
    match env!("TIDEGATE_COMMIT") {
        "unknown" => env!("CARGO_PKG_VERSION"),
        _ => concat!(env!("CARGO_PKG_VERSION"), " (", env!("TIDEGATE_COMMIT"), ")"),
    }
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Demo(arguments) => run_demo(&arguments),
        Command::Run(arguments) => run_gateway(arguments),
        Command::Check(arguments) => check(&arguments),
        Command::Config(command) => config(&command),
        Command::Purge(arguments) => purge(arguments),
        Command::Top(arguments) => show_top(arguments),
        Command::Key(arguments) => create_key(&arguments),
        Command::Password { name } => hash_password(&name),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "tidegate", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
        Command::Man { command } => print_manual(&command),
    }
}

fn config(command: &ConfigCommand) -> ExitCode {
    let (file, options) = match command {
        ConfigCommand::Schema => {
            return print(&format!("{:#}\n", gateway::config::schema()));
        }
        ConfigCommand::Print { file, defaults, origin } => {
            (file, PrintOptions { defaults: *defaults, origin: *origin })
        }
    };
    match Config::print(file, options) {
        Ok(text) => print(&text),
        Err(report) => {
            print_report(&report);
            ExitCode::FAILURE
        }
    }
}

fn run_gateway(arguments: RunArguments) -> ExitCode {
    let mode = arguments.upgrade.map_or(StartMode::Fresh, |socket| StartMode::Upgrade { socket });
    let (loaded, source) = match (arguments.config, arguments.upstream) {
        (Some(file), _) => {
            let loaded = Config::load(&file).map(|(config, warnings)| (config, Some(warnings)));
            (loaded, ConfigSource::File(file))
        }
        (None, upstream) => {
            let url = upstream.unwrap_or_default();
            let config = Config::for_upstream(&url, arguments.listen).map(|mut config| {
                config.admin.address = arguments.admin.unwrap_or(config.admin.address);
                (config, None)
            });
            (config, ConfigSource::Arguments)
        }
    };
    match loaded {
        Ok((config, warnings)) => {
            warnings.iter().for_each(print_report);
            start(config, (source, mode), |_| {})
        }
        Err(report) => {
            print_report(&report);
            ExitCode::FAILURE
        }
    }
}

fn check(arguments: &CheckArguments) -> ExitCode {
    let (report, is_valid) = match Config::verify(&arguments.file) {
        Ok((_, warnings)) => {
            let is_valid = warnings.is_empty() || !arguments.deny_warnings;
            (warnings, is_valid)
        }
        Err(report) => (report, false),
    };
    let mut text = String::new();
    if arguments.json {
        text = format!("{:#}\n", report.to_json());
    } else {
        print_report(&report);
        if is_valid {
            text = format!("{}: valid\n", arguments.file.display());
        }
    }
    let printed = print(&text);
    if is_valid { printed } else { ExitCode::FAILURE }
}

/// Exits with a failure if a node or server has not acknowledged the purge, so that scripts can
/// detect it.
fn purge(arguments: PurgeArguments) -> ExitCode {
    let everything = arguments.all.then_some(PurgeTarget::Everything);
    let tags = arguments.tag.into_iter().map(PurgeTarget::Tag);
    let targets = arguments.url.into_iter().map(PurgeTarget::Url).chain(tags).chain(everything).collect();
    let order = PurgeOrder { targets, is_soft: arguments.soft, node: arguments.node };
    let token = arguments.token.filter(|token| !token.is_empty());
    let outcome = match admin_client::purge(arguments.admin, token.as_deref(), &order) {
        Ok(outcome) => outcome,
        Err(error) => return fail(&error.to_string()),
    };
    let names = |key: &str| {
        let names = outcome[key].as_array().into_iter().flatten().filter_map(|name| name.as_str());
        names.collect::<Vec<_>>().join(", ")
    };
    let action = if order.is_soft { "marked stale" } else { "purged" };
    let acknowledged = names("acknowledged_nodes");
    if !acknowledged.is_empty() {
        print(&format!("{action}: {} (on {acknowledged})\n", order.description()));
    }
    let (nodes, servers) = (names("unacknowledged_nodes"), names("unreachable_servers"));
    if !nodes.is_empty() {
        print_error(&format!("not acknowledged by nodes {nodes}: they apply it when they are reachable again"));
    }
    if !servers.is_empty() {
        print_error(&format!("unreachable servers {servers}: they receive it when they are reachable again"));
    }
    if nodes.is_empty() && servers.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn show_top(arguments: TopArguments) -> ExitCode {
    let TopArguments { once, admin, token } = arguments;
    let target = TopTarget { admin, token: token.filter(|token| !token.is_empty()) };
    match if once { top::print_once(&target) } else { top::run(&target) } {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}

/// Prints the manual page in troff.
fn print_manual(names: &[String]) -> ExitCode {
    let mut program = Arguments::command();
    // Names the commands in full, as `tidegate run`.
    program.build();
    let command = names.iter().try_fold(&program, |command, name| command.find_subcommand(name));
    let Some(command) = command else { return fail("there is no such command; see `tidegate --help`") };
    let mut page = Vec::new();
    // A command has no version of its own.
    let source = format!("tidegate {}", env!("CARGO_PKG_VERSION"));
    match clap_mangen::Man::new(command.clone()).source(source).render(&mut page) {
        Ok(()) => print(&String::from_utf8_lossy(&page)),
        Err(error) => fail(&error.to_string()),
    }
}

/// Prints the line of the file on standard output. A new key goes to standard error, so that `>>`
/// adds no key to the file.
fn create_key(arguments: &KeyArguments) -> ExitCode {
    let tier = arguments.tier.as_deref();
    let created = match arguments.stdin {
        false => NewApiKey::generate(&arguments.name, tier).map_err(|error| error.to_string()),
        true => {
            read_secret().and_then(|key| NewApiKey::of(key, &arguments.name, tier).map_err(|error| error.to_string()))
        }
    };
    match created {
        Ok(created) => {
            if !arguments.stdin {
                print_error(&format!("key of {}, shown only now: {}", arguments.name, created.key));
            }
            print(&format!("{}\n", created.line))
        }
        Err(error) => fail(&error),
    }
}

fn hash_password(name: &str) -> ExitCode {
    match read_secret().and_then(|password| credentials::password_line(name, &password)) {
        Ok(line) => print(&format!("{line}\n")),
        Err(error) => fail(&error),
    }
}

fn fail(error: &str) -> ExitCode {
    print_error(error);
    ExitCode::FAILURE
}

/// The one line of standard input, of at most 1 KiB. Of more, a part would become the secret.
fn read_secret() -> Result<String, String> {
    const BYTES_MAX: usize = 1_024;
    let stdin = std::io::stdin();
    let mut input = stdin.lock().take(BYTES_MAX as u64 + 1);
    let mut text = String::new();
    // A terminal has no end.
    let read = if stdin.is_terminal() { input.read_line(&mut text) } else { input.read_to_string(&mut text) };
    read.map_err(|error| format!("cannot read standard input: {error}"))?;
    if text.len() > BYTES_MAX {
        return Err("standard input has more than 1 KiB; write one line".to_owned());
    }
    let line = text.trim_end_matches(['\r', '\n']);
    if line.contains('\n') {
        return Err("standard input has several lines; write one".to_owned());
    }
    Ok(line.to_owned())
}

fn run_demo(arguments: &DemoArguments) -> ExitCode {
    let origin = match demo::spawn_origin() {
        Ok(origin) => origin,
        Err(error) => return fail(&format!("cannot start the demo origin: {error}")),
    };
    let variables = [
        ("DEMO_LISTEN", arguments.listen.to_string()),
        ("DEMO_ADMIN", arguments.admin.to_string()),
        ("DEMO_ORIGIN", format!("http://{}", origin.address())),
        ("DEMO_ACCESS_LOG", if arguments.access_log { "stdout" } else { "off" }.to_owned()),
    ];
    let env = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
    let document = ConfigDocument {
        name: "demo.toml",
        text: demo::CONFIG,
        format: DocumentFormat::Toml,
        base: Path::new(""),
        env: &env,
    };
    match Config::parse(&document) {
        Ok((config, _)) => start(config, (ConfigSource::Arguments, StartMode::Fresh), |bound| {
            if let Some(listen) = bound.listen.first() {
                print(&demo::instructions(*listen, bound.admin));
            }
        }),
        Err(report) => {
            print_report(&report);
            ExitCode::FAILURE
        }
    }
}

fn start(config: Config, source: (ConfigSource, StartMode), on_ready: impl FnOnce(&BoundAddresses)) -> ExitCode {
    let is_terminal = std::io::stderr().is_terminal();
    event::init(config.log.level, if is_terminal { event::LogFormat::Text } else { event::LogFormat::Json });
    let (is_from_arguments, admin) = (matches!(source.0, ConfigSource::Arguments), config.admin.address);
    match server::run(config, source, on_ready) {
        Ok(()) => ExitCode::SUCCESS,
        Err(StartError::Listen { address, source })
            if is_from_arguments && source.kind() == std::io::ErrorKind::AddrInUse =>
        {
            let (option, free) = if address == admin { ("--admin", 9901) } else { ("--listen", 8081) };
            let free = SocketAddr::new(address.ip(), free);
            fail(&format!("cannot listen on {address}: {source}; choose another address: {option} {free}"))
        }
        Err(error) => fail(&error.to_string()),
    }
}

/// Prints faults to standard error, in colour on a terminal.
fn print_report(report: &ConfigReport) {
    if report.is_empty() {
        return;
    }
    let is_terminal = std::io::stderr().is_terminal();
    let renderer = if is_terminal { Renderer::styled() } else { Renderer::plain() };
    write_error(&report.render(&renderer).to_string());
}

/// Prints to standard output. A reader that has closed the pipe, such as `head`, has read what it
/// wanted; another failure is one of the command.
fn print(text: &str) -> ExitCode {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            fail(&format!("cannot write to standard output: {error}"))
        }
        _ => ExitCode::SUCCESS,
    }
}

fn print_error(error: &str) {
    write_error(&format!("tidegate: {error}"));
}

/// Writes a line to standard error, unless that is closed: there is no other place to report it.
fn write_error(line: &str) {
    let _reader_may_be_gone = writeln!(std::io::stderr(), "{line}");
}
