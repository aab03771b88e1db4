//! `tidegate`: the command. Arguments become a configuration, and the configuration runs.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use annotate_snippets::Renderer;
use clap::{Args, CommandFactory, Parser, Subcommand};
use gateway::config::{Config, Format, Report, Source};
use gateway::purge::{Order, Target};
use gateway::server::{self, Bound, Origin};
use gateway::{admin_client, demo, event};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A high-concurrency caching gateway.
#[derive(Parser)]
#[command(name = "tidegate", version, about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A self-contained tour: built-in origin, local cache, limits, breaker; prints what to try
    Demo(DemoArguments),
    /// Run the gateway, from a configuration file or in front of one upstream
    Run(RunArguments),
    /// Check a configuration file without opening a socket or a log
    Check(CheckArguments),
    /// End what a running gateway, and its fleet, has stored: of a URL, of a tag, or everything
    Purge(PurgeArguments),
    /// Print the completion script of a shell
    Completions { shell: clap_complete::Shell },
}

#[derive(Args)]
struct DemoArguments {
    /// Address of the gateway
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Address of the admin page and metrics
    #[arg(long, default_value = "127.0.0.1:9900")]
    admin: SocketAddr,
}

#[derive(Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("source").required(true).args(["config", "upstream"]))]
struct RunArguments {
    /// Configuration file, TOML or JSON (by its ending)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Stand in front of this upstream with sound defaults and no file
    #[arg(long, value_name = "URL")]
    upstream: Option<String>,
    /// Address to serve, with --upstream [default: 127.0.0.1:8080]
    #[arg(long, conflicts_with = "config")]
    listen: Option<SocketAddr>,
    /// Address of the admin page and metrics, with --upstream [default: 127.0.0.1:9900]
    #[arg(long, conflicts_with = "config")]
    admin: Option<SocketAddr>,
}

#[derive(Args)]
struct CheckArguments {
    /// Configuration file, TOML or JSON (by its ending)
    file: PathBuf,
    /// Print the faults as JSON
    #[arg(long)]
    json: bool,
    /// Let warnings fail the check
    #[arg(long)]
    deny_warnings: bool,
}

#[derive(Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("target").required(true).multiple(true).args(["url", "tag", "all"]))]
struct PurgeArguments {
    /// A whole URL, with its host and its query; may be given several times
    #[arg(long, value_name = "URL")]
    url: Vec<String>,
    /// A surrogate key that the origin gave; may be given several times
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// Everything
    #[arg(long)]
    all: bool,
    /// Make it stale instead: it may answer while it is validated, and for a failing origin
    #[arg(long)]
    soft: bool,
    /// On this node of the fleet alone, by its `server.node`
    #[arg(long)]
    node: Option<String>,
    /// Admin address of the gateway
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9900")]
    admin: SocketAddr,
    /// Token of the admin address
    #[arg(long, env = "ADMIN_TOKEN", hide_env_values = true)]
    token: Option<String>,
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Demo(arguments) => run_demo(&arguments),
        Command::Run(arguments) => run_gateway(arguments),
        Command::Check(arguments) => check(&arguments),
        Command::Purge(arguments) => purge(arguments),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "tidegate", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
    }
}

fn run_gateway(arguments: RunArguments) -> ExitCode {
    let (loaded, origin) = match (arguments.config, arguments.upstream) {
        (Some(file), _) => {
            let loaded = Config::load(&file).map(|(config, warnings)| (config, Some(warnings)));
            (loaded, Origin::File(file))
        }
        (None, upstream) => {
            let url = upstream.unwrap_or_default();
            let config = Config::for_upstream(&url, arguments.listen).map(|mut config| {
                config.admin.address = arguments.admin.unwrap_or(config.admin.address);
                (config, None)
            });
            (config, Origin::Arguments)
        }
    };
    match loaded {
        Ok((config, warnings)) => {
            warnings.iter().for_each(say);
            start(config, origin, |_| {})
        }
        Err(report) => {
            say(&report);
            ExitCode::FAILURE
        }
    }
}

fn check(arguments: &CheckArguments) -> ExitCode {
    let (report, is_valid) = match Config::load(&arguments.file) {
        Ok((_, warnings)) => {
            let is_valid = warnings.is_empty() || !arguments.deny_warnings;
            (warnings, is_valid)
        }
        Err(report) => (report, false),
    };
    if arguments.json {
        print(&format!("{:#}\n", report.to_json()));
    } else {
        say(&report);
        if is_valid {
            print(&format!("{}: valid\n", arguments.file.display()));
        }
    }
    if is_valid { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Fails where a node or a server has not confirmed it: a script is to know.
fn purge(arguments: PurgeArguments) -> ExitCode {
    let everything = arguments.all.then_some(Target::Everything);
    let tags = arguments.tag.into_iter().map(Target::Tag);
    let targets = arguments.url.into_iter().map(Target::Url).chain(tags).chain(everything).collect();
    let order = Order { targets, is_soft: arguments.soft, node: arguments.node };
    let token = arguments.token.filter(|token| !token.is_empty());
    let outcome = match admin_client::purge(arguments.admin, token.as_deref(), &order) {
        Ok(outcome) => outcome,
        Err(error) => {
            eprintln!("tidegate: {error}");
            return ExitCode::FAILURE;
        }
    };
    let names = |key: &str| {
        let names = outcome[key].as_array().into_iter().flatten().filter_map(|name| name.as_str());
        names.collect::<Vec<_>>().join(", ")
    };
    let what = if order.is_soft { "made stale" } else { "purged" };
    print(&format!("{what}: {} (on {})\n", order.told(), names("acknowledged")));
    let (missing, untold) = (names("missing"), names("untold"));
    if !missing.is_empty() {
        eprintln!("tidegate: not confirmed by {missing}: done as soon as they are reached again");
    }
    if !untold.is_empty() {
        eprintln!("tidegate: not known to {untold}: told as soon as they answer again");
    }
    if missing.is_empty() && untold.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_demo(arguments: &DemoArguments) -> ExitCode {
    let origin = match demo::spawn_origin() {
        Ok(origin) => origin,
        Err(error) => {
            eprintln!("tidegate: the demo's origin could not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let variables = [
        ("DEMO_LISTEN", arguments.listen.to_string()),
        ("DEMO_ADMIN", arguments.admin.to_string()),
        ("DEMO_ORIGIN", format!("http://{}", origin.address())),
    ];
    let env = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
    let source = Source { name: "demo.toml", text: demo::CONFIG, format: Format::Toml, base: Path::new(""), env: &env };
    match Config::parse(&source) {
        Ok((config, _)) => start(config, Origin::Arguments, |bound| {
            if let Some(listen) = bound.listen.first() {
                print(&demo::tour(*listen, bound.admin));
            }
        }),
        Err(report) => {
            say(&report);
            ExitCode::FAILURE
        }
    }
}

fn start(config: Config, origin: Origin, on_ready: impl FnOnce(&Bound)) -> ExitCode {
    let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    event::init(config.log.level, if is_terminal { event::Format::Text } else { event::Format::Json });
    match server::run(config, origin, on_ready) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tidegate: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Faults go to standard error, in colour for a person.
fn say(report: &Report) {
    if report.is_empty() {
        return;
    }
    let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let renderer = if is_terminal { Renderer::styled() } else { Renderer::plain() };
    eprintln!("{}", report.render(&renderer));
}

/// Prints, and does not mind a reader that has gone.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}
