//! Redis servers on the load's core, and their read counters.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::error::{LoadtestError, Result};
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::tools::{LOAD_CORE, Tool, Tools};
use crate::servers::free_address::free_addresses;

const TIMEOUT: Duration = Duration::from_secs(10);

/// A Redis process on the load's core, without persistence and stopped on drop, with its address.
pub(crate) struct RedisServer {
    address: SocketAddr,
    _process: ChildProcess,
}

impl RedisServer {
    pub(crate) fn start(name: &str, tools: &Tools, scratch: &ScratchDirectory) -> Result<Self> {
        let [address] = free_addresses()?;
        Self::start_at(name, address, (tools, scratch))
    }

    /// At the address of a server that has ended.
    pub(crate) fn start_at(
        name: &str,
        address: SocketAddr,
        (tools, scratch): (&Tools, &ScratchDirectory),
    ) -> Result<Self> {
        let mut command = tools.pinned(LOAD_CORE, tools.path(Tool::Redis));
        command.args([
            "--port",
            &address.port().to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]);
        command.current_dir(scratch.path());
        let mut process = ChildProcess::start(name, command, scratch)?;
        process.await_ready(TIMEOUT, || query(address, "PING").is_ok())?;
        Ok(RedisServer { address, _process: process })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Values read from the server so far.
    pub(crate) fn reads(&self) -> Result<u64> {
        let text = query(self.address, "INFO commandstats")
            .map_err(LoadtestError::io("cannot read the statistics of a Redis server"))?;
        let calls = text.lines().find_map(|line| line.strip_prefix("cmdstat_getrange:calls="));
        Ok(calls.and_then(|calls| calls.split(',').next()?.parse().ok()).unwrap_or(0))
    }
}

/// Sends one command on a new connection; the reply is a simple or a bulk string.
fn query(address: SocketAddr, command: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("{command}\r\n").as_bytes())?;
    let (mut reader, mut line) = (BufReader::new(stream), String::new());
    reader.read_line(&mut line)?;
    let Some(length) = line.strip_prefix('$') else { return Ok(line) };
    let length = length.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not RESP"))?;
    let mut text = String::new();
    reader.take(length).read_to_string(&mut text)?;
    Ok(text)
}
