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

/// Runs `nodes` for `seconds`, loads in requests per second of each node; what ordinary and platinum traffic asked and got
/// after the first second.
fn run(quota: Quota, nodes: u32, reserve: f64, loads: [u64; 2], seconds: u64) -> ([u64; 2], [u64; 2]) {
    let reserves = [Fraction::try_from(reserve).unwrap(), Fraction::ZERO];
    let mut bank = Bank::default();
    let mut fleet: Vec<Node> = (0..nodes)
        .map(|node| {
            let lease = Lease::new(quota, settings(node.into(), nodes, Backing::Treasury), at(0)).unwrap();
            Node { lease, answer: None, owed: [0; 2], asked: [0; 2], passed: [0; 2] }
        })
        .collect();
    for millis in 1..=seconds * 1_000 {
        for node in &mut fleet {
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
    for (nodes, burst) in [(1, 10_000), (2, 10_000), (4, 2_000)] {
        for part in [20, 80] {
            let each = 10_000 / u64::from(nodes);
            let (asked, passed) = run(quota(10_000, burst), nodes, 0.4, [each * 10, each * part / 100], 6);
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

#[test]
fn a_reserve_takes_nothing_from_ordinary_traffic_alone() {
    for (nodes, burst) in [(1, 10_000), (2, 1_000), (4, 2_000)] {
        let each = 10_000 / u64::from(nodes);
        for factor in [1, 10] {
            let got = [0.0, 0.4].map(|reserve| run(quota(10_000, burst), nodes, reserve, [each * factor, 0], 6).1[0]);
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
