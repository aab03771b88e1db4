//! What a reserve does in a fleet that lives on grants: 1 ms to the treasury and back, ordinary traffic at ten times the
//! rate, and platinum below it.

use super::*;

struct Node {
    lease: Lease,
    answer: Option<(u64, Grant)>,
    owed: [u64; 2],
    asked: [u64; 2],
    passed: [u64; 2],
}

/// Runs a node for each of `loads`, in requests per second, for `seconds`; what ordinary and platinum traffic asked and
/// got after the first second.
fn run(quota: Quota, reserve: f64, loads: &[[u64; 2]], seconds: u64) -> ([u64; 2], [u64; 2]) {
    let nodes = u32::try_from(loads.len()).unwrap();
    let reserves = [Fraction::try_from(reserve).unwrap(), Fraction::ZERO];
    let mut bank = Bank::default();
    let mut fleet: Vec<Node> = (0..nodes)
        .map(|node| {
            let lease = Lease::new(quota, settings(node.into(), nodes, Backing::Treasury), at(0)).unwrap();
            Node { lease, answer: None, owed: [0; 2], asked: [0; 2], passed: [0; 2] }
        })
        .collect();
    for millis in 1..=seconds * 1_000 {
        for (node, loads) in fleet.iter_mut().zip(loads) {
            if let Some((_, grant)) = node.answer.take_if(|(due, _)| *due <= millis) {
                node.lease.deposit(grant, at(millis));
            }
            if let Some(ask) = node.lease.ask(at(millis)) {
                node.answer = Some((millis + 1, bank.withdraw(&ask, 1_700_000_000_000_000 + millis * 1_000)));
            }
            for who in [0, 1] {
                node.owed[who] += loads[who];
                while node.owed[who] >= 1_000 {
                    node.owed[who] -= 1_000;
                    let passed = match node.lease.peek(Cost::ONE, reserves[who], at(millis)) {
                        Ok(_) => node.lease.commit(Cost::ONE, reserves[who], at(millis)).is_ok(),
                        Err(_) => {
                            node.lease.turned_away(Cost::ONE, reserves[who]);
                            false
                        }
                    };
                    if millis > 1_000 {
                        node.asked[who] += 1;
                        node.passed[who] += u64::from(passed);
                    }
                }
            }
        }
    }
    let sum = |of: fn(&Node) -> [u64; 2]| [0, 1].map(|who| fleet.iter().map(|node| of(node)[who]).sum());
    (sum(|node| node.asked), sum(|node| node.passed))
}

#[test]
fn platinum_passes_while_ordinary_traffic_overloads_the_fleet() {
    for (nodes, burst) in [(1_usize, 10_000), (2, 10_000), (4, 2_000)] {
        for part in [20, 80] {
            let each = 10_000 / nodes as u64;
            let (asked, passed) = run(quota(10_000, burst), 0.4, &vec![[each * 10, each * part / 100]; nodes], 6);
            let total = passed[0] + passed[1];
            println!(
                "{nodes} nodes, burst {burst}, platinum at {part} %: {} of {}, {total} in all",
                passed[1], asked[1]
            );
            assert_eq!(passed[1], asked[1], "{nodes} nodes, burst {burst}, {part} %");
            assert!((48_500..=50_000 + u64::from(burst)).contains(&total), "{total}");
        }
    }
}

/// Shares follow what has no reserve to leave first: platinum need not come where the ordinary traffic is.
#[test]
fn platinum_passes_on_a_node_of_its_own() {
    for (others, burst) in [(1, 10_000), (3, 10_000), (3, 2_000)] {
        for part in [2, 20, 60] {
            let ordinary = [100_000 / others, 0];
            let loads = [vec![[0, 100 * part]], vec![ordinary; others as usize]].concat();
            let (asked, passed) = run(quota(10_000, burst), 0.4, &loads, 6);
            let total = passed[0] + passed[1];
            println!(
                "beside {others}, burst {burst}, platinum at {part} %: {} of {}, {total} in all",
                passed[1], asked[1]
            );
            assert!(passed[1] * 100 >= asked[1] * 99, "{others}, {burst}, {part} %: {} of {}", passed[1], asked[1]);
            // The bucket fills to its half, once: what is above that is anyone's.
            assert!((49_500 - u64::from(burst / 4)..=50_000 + u64::from(burst)).contains(&total), "{total}");
        }
    }
}

#[test]
fn a_reserve_takes_nothing_from_ordinary_traffic_alone() {
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

/// A large cost waits for the reserve too: the node has to ask for both.
#[test]
fn a_large_cost_is_not_starved_by_its_own_reserve() {
    for (tokens, part) in [(16, 0.0), (15, 0.4), (16, 0.4), (12, 0.8), (19, 0.9)] {
        let lease = Lease::new(quota(1_000, 40), settings(1, 1, Backing::Treasury), at(0)).unwrap();
        let (mut bank, mut passed) = (Bank::default(), 0);
        let reserve = Fraction::try_from(part).unwrap();
        for millis in 1..=5_000 {
            if let Some(ask) = lease.ask(at(millis)) {
                lease.deposit(bank.withdraw(&ask, 1_700_000_000_000_000 + millis * 1_000), at(millis));
            }
            if millis % 50 == 0 {
                match lease.peek(cost(tokens), reserve, at(millis)) {
                    Ok(_) => passed += u64::from(lease.commit(cost(tokens), reserve, at(millis)).is_ok()),
                    Err(_) => lease.turned_away(cost(tokens), reserve),
                }
            }
        }
        assert!(passed >= 95, "{tokens} with {part}: {passed} of 100, at a third of the rate");
    }
}

/// Whatever is accepted passes, on every node, though local time left a fraction of a token at the start and in an outage,
/// and for a client that comes back as late as it is told to, in whole seconds.
#[test]
fn the_largest_cost_that_is_accepted_passes() {
    for (nodes, burst) in [(1_u32, 2), (1, 40), (1, 41), (2, 40), (3, 100)] {
        for (part, pause) in [0.0, 0.4, 0.9].into_iter().flat_map(|part| [(part, 100), (part, 1_000)]) {
            let (quota, reserve) = (quota(10 * u64::from(burst), burst), Fraction::try_from(part).unwrap());
            let settings = |node: u32| settings(node.into(), nodes, Backing::Treasury);
            let Some(largest) = NonZeroU32::new(Lease::cost_max(quota, settings(0), reserve)).map(Cost::new) else {
                continue;
            };
            let fleet: Vec<_> = (0..nodes).map(|node| Lease::new(quota, settings(node), at(0)).unwrap()).collect();
            let (mut bank, mut passed) = (Bank::default(), 0);
            for millis in 1..=50 * pause {
                for lease in &fleet {
                    match lease.ask(at(millis)) {
                        Some(_) if (3_000..3_200).contains(&millis) => lease.failed(at(millis)),
                        Some(ask) => {
                            lease.deposit(bank.withdraw(&ask, 1_700_000_000_000_000 + millis * 1_000), at(millis));
                        }
                        None => {}
                    }
                    if millis % pause == 0 {
                        passed += u32::from(lease.commit(largest, reserve, at(millis)).is_ok());
                    }
                }
            }
            let least = 45 * nodes;
            assert!(
                passed >= least,
                "{largest:?} with {part} on {nodes}, burst {burst}, {pause} ms: {passed} of {least}"
            );
        }
    }
}

/// Thirty tokens take half a minute to come, and nobody asks for them meanwhile.
#[test]
fn a_large_cost_of_a_slow_rule_is_kept_for_until_its_client_is_back() {
    let slow = Quota::new("60/m".parse().unwrap(), NonZeroU32::new(80).unwrap()).unwrap();
    let lease = Lease::new(slow, settings(1, 1, Backing::Treasury), at(0)).unwrap();
    let (mut bank, mut come_back) = (Bank::default(), Some(at(1_000)));
    for millis in 1..=60_000 {
        if let Some(ask) = lease.ask(at(millis)) {
            lease.deposit(bank.withdraw(&ask, 1_700_000_000_000_000 + millis * 1_000), at(millis));
        }
        if come_back.is_some_and(|then| then <= at(millis)) {
            come_back = lease.commit(cost(30), Fraction::ZERO, at(millis)).err().map(|wait| at(millis) + wait.after);
        }
    }
    assert_eq!(come_back, None, "it never passed");
}
