//! Random faults of every kind at random times. Only the bound must hold.

use std::num::NonZeroU32;

use limiter::{Fraction, Quota, Rate};

use crate::MS;
use crate::fleet::Fleet;
use crate::random::Random;

pub(crate) struct ChaosRun {
    burst: u32,
    /// The largest excess of any window over `rate * t`, in tokens, and the largest allowed.
    pub(crate) excess: f64,
    pub(crate) excess_max: f64,
    pub(crate) log: Vec<String>,
}

const RATE: u64 = 2_000;
const PHASES: usize = 24;

impl ChaosRun {
    pub(crate) fn run(seed: u64) -> ChaosRun {
        let mut random = Random::new(seed);
        let nodes = 1 + random.below(8) as u32;
        let burst = nodes * 2 + random.below([100, 1_000, 4_000][seed as usize % 3]) as u32;
        let rate = Rate::new(RATE, 1).expect("a rate");
        let quota = Quota::new(rate, NonZeroU32::new(burst).expect("not zero")).expect("a quota");
        let mut fleet = Fleet::new(quota, nodes, nodes, seed);
        fleet.keep_history();
        // Shares follow priority demand first, which has no reserve to leave.
        let ordinary = Fraction::try_from(0.4).expect("a fraction");
        fleet.nodes.iter_mut().for_each(|node| node.reserve = [Fraction::ZERO, ordinary][random.below(2) as usize]);
        let log = vec![format!("{nodes} nodes, burst {burst}")];
        let mut run = ChaosRun { burst, excess: 0.0, excess_max: f64::from(burst), log };
        let mut demand = vec![0.0; nodes as usize];
        for _ in 0..PHASES {
            run.inject_fault(&mut fleet, &mut random);
            run.restart(&mut fleet, &mut random, &demand);
            change_demand(&mut demand, &mut random);
            // Short phases, in which no node is silent for long; and long ones, in which a burst
            // refills.
            let duration = [20, 60, 120, 200, 400, 1_200][random.below(6) as usize];
            run.log.push(format!("{} ms: {demand:.0?} for {duration} ms, {}", fleet.now() / MS, fleet.audit.worst));
            (0..duration).for_each(|_| fleet.tick(|index| demand[index]));
        }
        run.excess = fleet.audit.worst;
        run
    }

    /// Kills some nodes, each at random or all at once, and starts others in their place at once or
    /// soon, even while others are cut off. A node that starts uses an equal share until its first
    /// grant, whatever the dead node had; therefore no restart while messages are lost.
    fn restart(&mut self, fleet: &mut Fleet, random: &mut Random, demand: &[f64]) {
        if random.below(6) > 0 || fleet.network.is_down || fleet.network.lost > 0 || !fleet.all_known_for(0) {
            return;
        }
        let of_million = [200_000, 1_000_000][random.below(2) as usize];
        let is_killed =
            |fleet: &Fleet, node: usize, random: &mut Random| !fleet.network.cut_off[node] && random.chance(of_million);
        let killed: Vec<usize> = (0..demand.len()).filter(|&node| is_killed(fleet, node, random)).collect();
        killed.iter().for_each(|&node| fleet.kill(node));
        let delay = random.below(4) * random.below(150);
        (0..delay).for_each(|_| fleet.tick(|index| demand[index]));
        killed.iter().for_each(|&node| fleet.start(node));
        self.log.push(format!("{killed:?} killed, started after {delay} ms"));
    }

    fn inject_fault(&mut self, fleet: &mut Fleet, random: &mut Random) {
        let fault = random.below(12);
        match fault {
            0 | 9 => fleet.network.is_down = true,
            1 | 10 => fleet.network.is_down = false,
            2 => {
                // A new or older bucket does not know of nodes that never reached it: no node is
                // cut off when it begins.
                fleet.network.cut_off.fill(false);
                fleet.network.is_down = false;
                fleet.reset_bucket();
            }
            3 | 4 if fleet.all_known_for(0) => {
                let of_million = [0, 300_000, 1_000_000][random.below(3) as usize];
                for cut_off in &mut fleet.network.cut_off {
                    *cut_off = random.chance(of_million);
                }
            }
            5 => {
                fleet.redis_ahead += random.below(7_200_000_000).cast_signed() - 3_600_000_000;
                // A jump forward is worth 20 ms.
                self.excess_max += RATE as f64 * 0.02;
            }
            6 => fleet.network.lost = [0, 10_000, 200_000][random.below(3) as usize],
            7 if fleet.all_known_for(1_100 * MS) => {
                fleet.network.cut_off.fill(false);
                fleet.network.is_down = false;
                fleet.fail_over();
                self.excess_max += f64::from((self.burst / 2).max(1));
            }
            _ => {}
        }
        let network = &fleet.network;
        let cut_off: Vec<u8> = network.cut_off.iter().map(|&is| u8::from(is)).collect();
        self.log.push(format!("fault {fault}: down {}, cut off {cut_off:?}, lost {}", network.is_down, network.lost));
    }
}

/// Idle, within the share, or far above it: all nodes alike, or each at random.
fn change_demand(demand: &mut [f64], random: &mut Random) {
    let equal = RATE as f64 / demand.len() as f64;
    match random.below(4) {
        0 => demand.fill(0.0),
        1 => demand.fill(20.0 * equal),
        _ => {
            for node in demand {
                *node = equal * [0.0, 0.05, 0.8, 2.0, 20.0][random.below(5) as usize];
            }
        }
    }
}
