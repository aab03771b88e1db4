//! A gateway process of a field case: its configuration, its admin address, and signals to it.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::case::client::CaseClient;
use crate::error::{LoadtestError, Result};
use crate::interrupt::wait_for;
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::template::fill_template;
use crate::process::tools::{Tool, Tools};
use crate::servers::free_address::free_addresses;

const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Before the configuration of a case.
const HEAD: &str = "version = 1\n[[listen]]\naddress = \"@LISTEN@\"\n[admin]\naddress = \"@ADMIN@\"\n";

/// Unless the case has its own. A gateway of a case ends at once.
const SERVER: &str = "[server]\nnode = \"@NODE@\"\nworkers = 2\ndrain_idle = \"0s\"\n";

/// Short cases take less than half a minute on two cores; long ones show the times of the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CaseForm {
    Short,
    Long,
}

/// The programs of a case, its form, and the directory of its files.
#[derive(Clone, Copy)]
pub(crate) struct CaseContext<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) tidegate: &'a Path,
    pub(crate) form: CaseForm,
    pub(crate) scratch: &'a ScratchDirectory,
}

impl CaseContext<'_> {
    /// One of two values, by the form.
    pub(crate) fn pick<T>(&self, short: T, long: T) -> T {
        match self.form {
            CaseForm::Short => short,
            CaseForm::Long => long,
        }
    }

    /// A command that is killed when this process ends, even by SIGKILL.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(self.tools.path(Tool::Setpriv));
        command.args(["--pdeathsig", "KILL"]).arg(program).stdin(std::process::Stdio::null());
        command
    }

    /// The result of `tidegate check` of a configuration: `Err` with its output if it is refused.
    pub(crate) fn check_config(&self, name: &str, config: &str) -> Result<std::result::Result<(), String>> {
        let text = format!("version = 1\n{config}");
        let file = self.scratch.write(&format!("{name}.toml"), &text)?;
        let output = Command::new(self.tidegate).arg("check").arg(file).output();
        let output = output.map_err(LoadtestError::io("cannot start tidegate check"))?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        Ok(if output.status.success() { Ok(()) } else { Err(text) })
    }
}

/// A gateway that is ready, ended on drop.
pub(crate) struct CaseGateway {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    process: ChildProcess,
}

impl CaseGateway {
    pub(crate) fn start(context: &CaseContext<'_>, name: &str, config: &str) -> Result<Self> {
        Self::start_at(context, (name, free_addresses()?), (config, &[]))
    }

    /// At given addresses (listener, admin) and with environment variables.
    pub(crate) fn start_at(
        context: &CaseContext<'_>,
        (name, [address, admin]): (&str, [SocketAddr; 2]),
        (config, environment): (&str, &[(&str, &str)]),
    ) -> Result<Self> {
        let server = if config.contains("[server]") { "" } else { SERVER };
        let values = [("NODE", name.to_owned()), ("LISTEN", address.to_string()), ("ADMIN", admin.to_string())];
        let head =
            fill_template(&format!("{HEAD}{server}"), &values.each_ref().map(|(name, value)| (*name, value.as_str())));
        let file = context.scratch.write(&format!("{name}.toml"), &format!("{head}{config}"))?;
        let mut command = context.command(context.tidegate);
        command.arg("run").arg("--config").arg(file).envs(environment.iter().copied());
        let mut process = ChildProcess::start(name, command, context.scratch)?;
        process.await_ready(READY_TIMEOUT, || {
            CaseClient::new(admin).get("/ready", "").is_ok_and(|response| response.status == 200)
        })?;
        Ok(CaseGateway { name: name.to_owned(), address, admin, process })
    }

    pub(crate) fn client(&self) -> CaseClient {
        CaseClient::new(self.address)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Process log and access log so far.
    pub(crate) fn output(&self) -> String {
        self.process.output()
    }

    /// A document of the admin address.
    pub(crate) fn admin_json(&self, target: &str) -> Result<Value> {
        let response = CaseClient::new(self.admin).get(target, "").map_err(self.failed(target))?;
        serde_json::from_slice(&response.body).map_err(|fault| LoadtestError::Unexpected {
            file: format!("{target} of {}", self.name),
            text: fault.to_string(),
        })
    }

    /// A purge by the admin address: its status and its document.
    pub(crate) fn purge(&self, query: &str) -> Result<(u16, Value)> {
        let target = format!("/api/v1/purge?{query}");
        let response = CaseClient::new(self.admin).post(&target, ("", "")).map_err(self.failed(&target))?;
        Ok((response.status, serde_json::from_slice(&response.body).unwrap_or_default()))
    }

    /// The sum of the samples whose name, with labels, begins with `prefix`; 0 without any.
    pub(crate) fn metric(&self, prefix: &str) -> Result<f64> {
        let response = CaseClient::new(self.admin).get("/metrics", "").map_err(self.failed("/metrics"))?;
        let text = String::from_utf8_lossy(&response.body).into_owned();
        let samples = text.lines().filter(|line| line.starts_with(prefix));
        Ok(samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// Waits until the gateway reports no degraded part.
    pub(crate) fn await_whole(&self, timeout: Duration) -> Result<bool> {
        let is_whole =
            || Ok(self.admin_json("/ready")?["degraded"].as_array().is_some_and(Vec::is_empty).then_some(()));
        Ok(wait_for(timeout, is_whole)?.is_some())
    }

    /// Sends a signal, such as `STOP`.
    pub(crate) fn signal(&self, name: &str) -> Result<()> {
        // The `kill` of the shell, because std supports SIGKILL only.
        let mut kill = Command::new("/bin/sh");
        kill.args(["-c", "kill -\"$1\" \"$2\"", "sh", name, &self.pid().to_string()]);
        kill.status().map_err(LoadtestError::io("cannot send a signal"))?;
        Ok(())
    }

    /// Waits for the exit after SIGTERM; `None` if it takes too long.
    pub(crate) fn await_end(&mut self, timeout: Duration) -> Result<Option<bool>> {
        self.process.await_end(timeout, || ())
    }

    fn failed(&self, target: &str) -> impl FnOnce(std::io::Error) -> LoadtestError + use<> {
        LoadtestError::io(format!("{target} of the gateway {}", self.name))
    }
}
