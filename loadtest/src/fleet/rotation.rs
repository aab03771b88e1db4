//! The rotation of a load balancer: the gateways whose `/ready` is 200.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use crate::case::client::CaseClient;
use crate::fleet::node::FleetNode;
use crate::load::target::AddressSet;

/// Interval at which readiness is read: much shorter than any `drain_idle`.
const INTERVAL: Duration = Duration::from_millis(100);

/// Listener and admin address of a gateway.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    pub(crate) listener: SocketAddr,
    pub(crate) admin: SocketAddr,
}

impl Member {
    pub(crate) fn all(nodes: &[FleetNode]) -> Vec<Member> {
        nodes.iter().map(|node| Member { listener: node.listener(), admin: node.admin() }).collect()
    }

    fn is_ready(self) -> bool {
        CaseClient::new(self.admin).get("/ready", "").is_ok_and(|response| response.status == 200)
    }
}

/// A rotation of all members.
pub(crate) fn of_all(members: &[Member]) -> AddressSet {
    AddressSet::new(members.iter().map(|member| member.listener).collect())
}

/// Takes members that are not ready out of the rotation, and back, until `is_over`.
pub(crate) fn follow_readiness(rotation: &AddressSet, members: &[Member], is_over: &AtomicBool) {
    while !is_over.load(Relaxed) {
        let ready = members.iter().filter(|member| member.is_ready()).map(|member| member.listener);
        let ready: Vec<SocketAddr> = ready.collect();
        // With none left, the last ones stay, and their clients see what they lose.
        if !ready.is_empty() {
            rotation.replace(ready);
        }
        thread::sleep(INTERVAL);
    }
}
