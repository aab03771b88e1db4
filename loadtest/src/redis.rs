//! Real Redis servers on the core of the load, and how often each was read.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::failure::{Failure, Result};
use crate::launch::free_addresses;
use crate::process::{Running, Scratch};
use crate::tools::{LOAD_CORE, Tool, Tools};

const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Redis {
    address: SocketAddr,
    _process: Running,
}

impl Redis {
    pub(crate) fn start(name: &str, tools: &Tools, scratch: &Scratch) -> Result<Self> {
        let [address] = free_addresses()?;
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
        let mut process = Running::start(name, command, scratch)?;
        process.await_ready(PATIENCE, || ask(address, "PING").is_ok())?;
        Ok(Redis { address, _process: process })
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// How many values it was asked for so far.
    pub(crate) fn reads(&self) -> Result<u64> {
        let text = ask(self.address, "INFO commandstats").map_err(Failure::io("a Redis server does not tell"))?;
        let calls = text.lines().find_map(|line| line.strip_prefix("cmdstat_getrange:calls="));
        Ok(calls.and_then(|calls| calls.split(',').next()?.parse().ok()).unwrap_or(0))
    }
}

/// One command on a connection of its own, for an answer of one line or one text.
fn ask(address: SocketAddr, command: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{command}\r\n").as_bytes())?;
    let (mut reader, mut line) = (BufReader::new(stream), String::new());
    reader.read_line(&mut line)?;
    let Some(length) = line.strip_prefix('$') else { return Ok(line) };
    let length = length.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not RESP"))?;
    let mut text = String::new();
    reader.take(length).read_to_string(&mut text)?;
    Ok(text)
}
