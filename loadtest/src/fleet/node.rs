//! A gateway of a fleet. Its addresses and configuration outlive its process, so that it can be
//! started again.

use std::net::SocketAddr;
use std::time::Duration;

use crate::case::fake_clock::FakeClock;
use crate::case::gateway::{CaseContext, CaseGateway};
use crate::error::Result;
use crate::servers::free_address::free_addresses;

/// Longer than any `drain_timeout` of a fleet.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// How a gateway has ended after SIGTERM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DrainEnd {
    /// With exit status 0, before its `drain_timeout`.
    Clean,
    Unclean,
    /// It still runs.
    Missing,
}

/// One gateway, with what is needed to start it again.
pub(crate) struct FleetNode {
    pub(crate) name: String,
    addresses: [SocketAddr; 2],
    config: String,
    pub(crate) clock: Option<FakeClock>,
    pub(crate) gateway: Option<CaseGateway>,
}

impl FleetNode {
    /// A node that is not started yet. `@NODE@` in the configuration is its name.
    pub(crate) fn new(number: usize, config: &str) -> Result<Self> {
        let name = format!("node-{number}");
        let config = config.replace("@NODE@", &name);
        Ok(FleetNode { name, addresses: free_addresses()?, config, clock: None, gateway: None })
    }

    pub(crate) fn listener(&self) -> SocketAddr {
        self.addresses[0]
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        self.addresses[1]
    }

    /// Starts the gateway and waits until it is ready.
    pub(crate) fn start(&mut self, context: &CaseContext<'_>) -> Result<()> {
        let environment = self.clock.as_ref().map(FakeClock::environment).unwrap_or_default();
        let environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let at = (self.name.as_str(), self.addresses);
        self.gateway = Some(CaseGateway::start_at(context, at, (&self.config, &environment))?);
        Ok(())
    }

    /// Ends the gateway with SIGTERM and waits for its drain.
    pub(crate) fn stop(&mut self) -> Result<DrainEnd> {
        let Some(gateway) = &mut self.gateway else { return Ok(DrainEnd::Clean) };
        gateway.signal("TERM")?;
        Ok(match gateway.await_end(END_TIMEOUT)? {
            Some(true) if !gateway.output().contains("drain_timed_out") => DrainEnd::Clean,
            Some(_) => DrainEnd::Unclean,
            None => DrainEnd::Missing,
        })
    }
}
