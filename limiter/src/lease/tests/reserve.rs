//! Reserves in a fleet that uses grants: 1 ms to the backend and back, ordinary traffic at ten
//! times the rate, and platinum traffic below it.

use super::*;

/// A node with two classes of traffic, ordinary and platinum: requests due (in thousandths), sent
/// and admitted of each, and the grant in transit with the millisecond of its arrival.
struct Node {
    lease: Lease,
    reply: Option<(u64, LeaseGrant)>,
    due: [u64; 2],
    sent: [u64; 2],
    admitted: [u64; 2],
}

/// Runs one node for each of `loads`, in requests per second of ordinary and platinum traffic, for
/// `seconds`. Returns how many requests of each were sent and admitted after the first second.
fn run(quota: Quota, reserve: f64, loads: &[[u64; 2]], seconds: u64) -> ([u64; 2], [u64; 2]) {
    let nodes = u32::try_from(loads.len()).unwrap();
    let reserves = [Fraction::try_from(reserve).unwrap(), Fraction::ZERO];
    let mut server = LeaseServerModel::default();
    let mut fleet: Vec<Node> = (0..nodes)
        .map(|node| {
            let lease = Lease::new(quota, config(node.into(), nodes, LeaseSource::Backend), at(0)).unwrap();
            Node { lease, reply: None, due: [0; 2], sent: [0; 2], admitted: [0; 2] }
        })
        .collect();
    for millis in 1..=seconds * 1_000 {
        for (node, loads) in fleet.iter_mut().zip(loads) {
            if let Some((_, grant)) = node.reply.take_if(|(due, _)| *due <= millis) {
                node.lease.apply_grant(grant, at(millis));
            }
            if let Some(request) = node.lease.next_request(at(millis)) {
                node.reply = Some((millis + 1, server.handle(&request, 1_700_000_000_000_000 + millis * 1_000)));
            }
            for class in [0, 1] {
                node.due[class] += loads[class];
                while node.due[class] >= 1_000 {
                    node.due[class] -= 1_000;
                    let admitted = match node.lease.peek(Cost::ONE, reserves[class], at(millis)) {
                        Ok(_) => node.lease.commit(Cost::ONE, reserves[class], at(millis)).is_ok(),
                        Err(_) => {
                            node.lease.record_denied_demand(Cost::ONE, reserves[class]);
                            false
                        }
                    };
                    if millis > 1_000 {
                        node.sent[class] += 1;
                        node.admitted[class] += u64::from(admitted);
                    }
                }
            }
        }
    }
    let sum = |of: fn(&Node) -> [u64; 2]| [0, 1].map(|class| fleet.iter().map(|node| of(node)[class]).sum());
    (sum(|node| node.sent), sum(|node| node.admitted))
}

#[test]
fn platinum_passes_while_ordinary_traffic_overloads_the_fleet() {
    for (nodes, burst) in [(1_usize, 10_000), (2, 10_000), (4, 2_000)] {
        for percent in [20, 80] {
            let each = 10_000 / nodes as u64;
            let (sent, admitted) = run(quota(10_000, burst), 0.4, &vec![[each * 10, each * percent / 100]; nodes], 6);
            let total = admitted[0] + admitted[1];
            println!(
                "{nodes} nodes, burst {burst}, platinum at {percent} %: {} of {}, {total} in all",
                admitted[1], sent[1]
            );
            assert_eq!(admitted[1], sent[1], "{nodes} nodes, burst {burst}, {percent} %");
            assert!((48_500..=50_000 + u64::from(burst)).contains(&total), "{total}");
        }
    }
}

/// Shares follow priority demand, which leaves no reserve, first: platinum traffic may arrive on
/// other nodes than ordinary traffic.
#[test]
fn platinum_passes_on_its_own_node() {
    for (others, burst) in [(1, 10_000), (3, 10_000), (3, 2_000)] {
        for percent in [2, 20, 60] {
            let ordinary = [100_000 / others, 0];
            let loads = [vec![[0, 100 * percent]], vec![ordinary; others as usize]].concat();
            let (sent, admitted) = run(quota(10_000, burst), 0.4, &loads, 6);
            let total = admitted[0] + admitted[1];
            println!(
                "beside {others}, burst {burst}, platinum at {percent} %: {} of {}, {total} in all",
                admitted[1], sent[1]
            );
            assert!(
                admitted[1] * 100 >= sent[1] * 99,
                "{others}, {burst}, {percent} %: {} of {}",
                admitted[1],
                sent[1]
            );
            // The bucket fills to its half once; what is above that may go to any node.
            assert!((49_500 - u64::from(burst / 4)..=50_000 + u64::from(burst)).contains(&total), "{total}");
        }
    }
}

#[test]
fn a_reserve_costs_ordinary_traffic_nothing_without_other_traffic() {
    for (nodes, burst) in [(1_usize, 10_000), (2, 1_000), (4, 2_000)] {
        let each = 10_000 / nodes as u64;
        for factor in [1, 10] {
            let got =
                [0.0, 0.4].map(|reserve| run(quota(10_000, burst), reserve, &vec![[each * factor, 0]; nodes], 6).1[0]);
            println!("{nodes} nodes, burst {burst}, {factor} times the rate: {got:?} without and with a reserve");
            assert!(got[1] * 100 >= got[0] * 99, "{nodes} nodes, burst {burst}, {factor}: {got:?}");
        }
    }
}

/// A large cost needs the reserve too: the node must request enough for both.
#[test]
fn a_large_cost_is_not_starved_by_its_own_reserve() {
    for (tokens, percent) in [(16, 0.0), (15, 0.4), (16, 0.4), (12, 0.8), (19, 0.9)] {
        let lease = Lease::new(quota(1_000, 40), config(1, 1, LeaseSource::Backend), at(0)).unwrap();
        let (mut server, mut admitted) = (LeaseServerModel::default(), 0);
        let reserve = Fraction::try_from(percent).unwrap();
        for millis in 1..=5_000 {
            if let Some(request) = lease.next_request(at(millis)) {
                lease.apply_grant(server.handle(&request, 1_700_000_000_000_000 + millis * 1_000), at(millis));
            }
            if millis % 50 == 0 {
                match lease.peek(cost(tokens), reserve, at(millis)) {
                    Ok(_) => admitted += u64::from(lease.commit(cost(tokens), reserve, at(millis)).is_ok()),
                    Err(_) => lease.record_denied_demand(cost(tokens), reserve),
                }
            }
        }
        assert!(admitted >= 95, "{tokens} with {percent}: {admitted} of 100, at a third of the rate");
    }
}

/// Every accepted cost can pass on every node, even though the local rate leaves a fraction of a
/// token at the start and in an outage, and even for a client that retries as late as the response
/// says, in whole seconds.
#[test]
fn the_largest_accepted_cost_passes() {
    for (nodes, burst) in [(1_u32, 2), (1, 40), (1, 41), (2, 40), (3, 100)] {
        for (percent, pause) in [0.0, 0.4, 0.9].into_iter().flat_map(|percent| [(percent, 100), (percent, 1_000)]) {
            let (quota, reserve) = (quota(10 * u64::from(burst), burst), Fraction::try_from(percent).unwrap());
            let config = |node: u32| config(node.into(), nodes, LeaseSource::Backend);
            let Some(largest) = NonZeroU32::new(Lease::cost_max(quota, config(0), reserve)).map(Cost::new) else {
                continue;
            };
            let fleet: Vec<_> = (0..nodes).map(|node| Lease::new(quota, config(node), at(0)).unwrap()).collect();
            let (mut server, mut admitted) = (LeaseServerModel::default(), 0);
            for millis in 1..=50 * pause {
                for lease in &fleet {
                    match lease.next_request(at(millis)) {
                        Some(_) if (3_000..3_200).contains(&millis) => lease.request_failed(at(millis)),
                        Some(request) => {
                            lease.apply_grant(
                                server.handle(&request, 1_700_000_000_000_000 + millis * 1_000),
                                at(millis),
                            );
                        }
                        None => {}
                    }
                    if millis % pause == 0 {
                        admitted += u32::from(lease.commit(largest, reserve, at(millis)).is_ok());
                    }
                }
            }
            let least = 45 * nodes;
            assert!(
                admitted >= least,
                "{largest:?} with {percent} on {nodes}, burst {burst}, {pause} ms: {admitted} of {least}"
            );
        }
    }
}

/// Thirty tokens take half a minute, in which no client requests them.
#[test]
fn tokens_for_a_large_cost_are_kept_until_the_client_retries() {
    let slow = Quota::new("60/m".parse().unwrap(), NonZeroU32::new(80).unwrap()).unwrap();
    let lease = Lease::new(slow, config(1, 1, LeaseSource::Backend), at(0)).unwrap();
    let (mut server, mut retry_at) = (LeaseServerModel::default(), Some(at(1_000)));
    for millis in 1..=60_000 {
        if let Some(request) = lease.next_request(at(millis)) {
            lease.apply_grant(server.handle(&request, 1_700_000_000_000_000 + millis * 1_000), at(millis));
        }
        if retry_at.is_some_and(|then| then <= at(millis)) {
            retry_at = lease
                .commit(cost(30), Fraction::ZERO, at(millis))
                .err()
                .map(|throttled| at(millis) + throttled.retry_after);
        }
    }
    assert_eq!(retry_at, None, "it never admitted");
}
