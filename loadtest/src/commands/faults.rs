//! `loadtest faults`: a fault proxy of the command line, changed at run time over its control
//! address or by lines on standard input.

use std::io::BufRead as _;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use clap::Args;

use crate::error::{LoadtestError, Result};
use crate::faults::control;
use crate::faults::plan::{FaultPlan, FaultRule};
use crate::faults::proxy::FaultProxy;
use crate::interrupt;
use crate::servers::listen::listen;

/// Arguments of `loadtest faults`.
#[derive(Args, Clone, Debug)]
pub(crate) struct FaultsArguments {
    /// Listen address; port 0 is any free one
    #[arg(long)]
    listen: SocketAddr,
    /// Address that connections are relayed to: host:port
    #[arg(long)]
    upstream: String,
    /// Faults as `key=value` pairs, separated by commas; may be repeated. Keys: latency, jitter
    /// (durations), rate (bytes a second), drip (bytes each 100 ms), cut (FIN after bytes), reset
    /// (RST after bytes), hang, refuse, corrupt (probability of a byte), direction (up, down,
    /// both), share (of connections)
    #[arg(long = "fault", value_name = "FAULT", value_parser = FaultRule::parse)]
    faults: Vec<FaultRule>,
    /// Control address: GET reads plan and counts, PUT replaces the plan, DELETE clears it (JSON)
    #[arg(long, value_name = "ADDRESS")]
    control: Option<SocketAddr>,
    /// Seed of shares, jitter and changed bytes
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs until Ctrl-C.
pub(crate) fn run(arguments: FaultsArguments) -> Result<ExitCode> {
    let FaultsArguments { listen: address, upstream, faults, control, seed } = arguments;
    let upstream = upstream
        .to_socket_addrs()
        .map_err(|fault| LoadtestError::Usage(format!("--upstream {upstream}: {fault}; host:port is needed")))?
        .next()
        .ok_or_else(|| LoadtestError::Usage(format!("--upstream {upstream}: the name has no address")))?;
    let plan = FaultPlan { rules: faults }.checked().map_err(LoadtestError::Usage)?;
    interrupt::watch()?;
    let proxy = FaultProxy::start(address, upstream, (plan, seed))
        .map_err(LoadtestError::io(format!("cannot listen on {address}")))?;
    let proxy = Arc::new(proxy);
    println!("listening on {}, upstream {upstream}", proxy.address());
    let control =
        control.map(|address| listen(address).map_err(LoadtestError::io(format!("cannot listen on {address}"))));
    let control = control.transpose()?;
    if let Some(control) = &control {
        let address = control.local_addr().map_err(LoadtestError::io("a listener without address"))?;
        println!("control on {address}: curl http://{address}/");
    }
    println!(
        "a line of faults such as `latency=100ms,share=0.5; hang,share=0.1` replaces them; `clear` ends them; `show` prints them"
    );
    let reader = Arc::clone(&proxy);
    // Ends with the process: a read of standard input cannot be interrupted.
    thread::spawn(move || read_lines(&reader));
    match control {
        Some(control) => control::serve(&control, &proxy).map_err(LoadtestError::io("the control address failed"))?,
        None => {
            while proxy.is_running()
                && interrupt::wait_for(std::time::Duration::from_secs(1), || Ok(None::<()>)).is_ok()
            {}
        }
    }
    eprintln!("loadtest: {}", serde_json::to_string(&proxy.report()).expect("numbers"));
    Ok(ExitCode::SUCCESS)
}

/// Applies lines until the end of standard input.
fn read_lines(proxy: &FaultProxy) {
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { return };
        match line.trim() {
            "" => {}
            "show" => show(proxy),
            text => match FaultPlan::parse(text) {
                Ok(plan) => {
                    proxy.set_plan(plan);
                    show(proxy);
                }
                Err(fault) => eprintln!("loadtest: {fault}"),
            },
        }
    }
}

fn show(proxy: &FaultProxy) {
    let state = serde_json::json!({ "plan": *proxy.plan(), "counts": proxy.report() });
    println!("{state}");
}
