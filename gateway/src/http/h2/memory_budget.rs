//! The memory of all connections of the process, and the part of it that one client address may
//! have.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use super::abuse::subscriber;
use crate::event::Event;
use crate::label;
use crate::metrics::{Counters, Label as _};

/// Bytes that all HTTP/2 connections of the process have reserved.
static RESERVED: AtomicUsize = AtomicUsize::new(0);

/// Addresses with HTTP/2 connections. There are at most as many as connections.
static ADDRESSES: LazyLock<Mutex<AddressTable>> = LazyLock::new(Mutex::default);

label! {
    /// The memory that was not enough for a stream.
    pub(crate) StreamRefusal, "memory", {
        Connection = "connection",
        Address = "address",
        Process = "process",
    }
}

/// Streams that were refused for lack of memory.
static REFUSED: LazyLock<Counters<StreamRefusal>> = LazyLock::new(Counters::default);

/// Streams that were refused for lack of memory.
pub(crate) fn refused_streams() -> &'static Counters<StreamRefusal> {
    &REFUSED
}

/// Bytes that all HTTP/2 connections of the process have reserved.
pub(crate) fn reserved_bytes() -> usize {
    RESERVED.load(Relaxed)
}

/// Bytes that may be reserved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemoryLimits {
    pub(crate) process: usize,
    /// For one IPv4 address or one IPv6 /64.
    pub(crate) address: usize,
}

/// How much of a limit a reservation may use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum BudgetShare {
    All,
    /// The other half is left for new streams.
    Half,
}

impl BudgetShare {
    fn of(self, limit: usize) -> usize {
        match self {
            BudgetShare::All => limit,
            BudgetShare::Half => limit / 2,
        }
    }
}

/// The part of one connection in both.
pub(super) struct MemoryBudget {
    limits: MemoryLimits,
    address: IpAddr,
    of_address: Arc<AtomicUsize>,
}

/// By address: its connections, and the bytes that they have reserved.
type AddressTable = HashMap<IpAddr, (usize, Arc<AtomicUsize>), foldhash::fast::RandomState>;

fn addresses() -> MutexGuard<'static, AddressTable> {
    ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryBudget {
    #[cfg(test)]
    pub(super) fn unlimited() -> Self {
        let limits = MemoryLimits { process: usize::MAX, address: usize::MAX };
        MemoryBudget::new(IpAddr::from([192, 0, 2, 200]), limits)
    }

    /// Of a connection from `address`.
    pub(super) fn new(address: IpAddr, limits: MemoryLimits) -> Self {
        let address = subscriber(address);
        let mut addresses = addresses();
        let (connections, of_address) = addresses.entry(address).or_default();
        *connections += 1;
        let of_address = Arc::clone(of_address);
        MemoryBudget { limits, address, of_address }
    }

    /// Reserves `bytes` unless a limit forbids it, which is the error.
    pub(super) fn try_reserve(&self, bytes: usize, share: BudgetShare) -> Result<(), StreamRefusal> {
        let MemoryBudget { limits, of_address, .. } = self;
        if of_address.fetch_add(bytes, Relaxed) + bytes > share.of(limits.address) {
            of_address.fetch_sub(bytes, Relaxed);
            return Err(StreamRefusal::Address);
        }
        if RESERVED.fetch_add(bytes, Relaxed) + bytes > share.of(limits.process) {
            self.release(bytes);
            return Err(StreamRefusal::Process);
        }
        Ok(())
    }

    /// Reserves bytes that the client was allowed to send.
    pub(super) fn reserve(&self, bytes: usize) {
        self.of_address.fetch_add(bytes, Relaxed);
        RESERVED.fetch_add(bytes, Relaxed);
    }

    pub(super) fn release(&self, bytes: usize) {
        self.of_address.fetch_sub(bytes, Relaxed);
        RESERVED.fetch_sub(bytes, Relaxed);
    }

    pub(super) fn count_refusal(&self, refusal: StreamRefusal) {
        REFUSED.inc(refusal);
        Event::Http2StreamRefused { client: self.address, memory: refusal.as_str() }.emit();
    }

    /// Whether nothing is left of either limit.
    pub(super) fn is_full(&self) -> bool {
        RESERVED.load(Relaxed) >= self.limits.process || self.of_address.load(Relaxed) >= self.limits.address
    }
}

impl Drop for MemoryBudget {
    fn drop(&mut self) {
        let mut addresses = addresses();
        if let Entry::Occupied(mut entry) = addresses.entry(self.address) {
            entry.get_mut().0 -= 1;
            if entry.get().0 == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn one_address_leaves_memory_for_others() {
        let limits = MemoryLimits { process: 1 << 40, address: 4 * MIB };
        let [first, second, same] = ["192.0.2.1", "192.0.2.2", "192.0.2.1"]
            .map(|ip| MemoryBudget::new(ip.parse().expect("an address"), limits));
        assert_eq!(first.try_reserve(3 * MIB, BudgetShare::Half), Err(StreamRefusal::Address));
        assert_eq!(first.try_reserve(3 * MIB, BudgetShare::All), Ok(()));
        assert_eq!(same.try_reserve(2 * MIB, BudgetShare::All), Err(StreamRefusal::Address));
        assert_eq!(second.try_reserve(4 * MIB, BudgetShare::All), Ok(()));
        first.release(3 * MIB);
        assert_eq!(same.try_reserve(4 * MIB, BudgetShare::All), Ok(()));
        assert!(same.is_full() && first.is_full());
        same.release(4 * MIB);
        second.release(4 * MIB);
    }

    #[test]
    fn addresses_are_forgotten_with_their_last_connection() {
        let address: IpAddr = "2001:db8:7::1".parse().expect("an address");
        let limits = MemoryLimits { process: MIB, address: MIB };
        let budgets = [(); 2].map(|()| MemoryBudget::new(address, limits));
        assert!(addresses().contains_key(&subscriber("2001:db8:7::2".parse().expect("an address"))));
        let [first, second] = budgets;
        drop(first);
        assert!(addresses().contains_key(&subscriber(address)));
        drop(second);
        assert!(!addresses().contains_key(&subscriber(address)));
    }
}
