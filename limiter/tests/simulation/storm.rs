//! Owns bad weather: everything that can happen, at random, at the worst of times. Only the bound has to hold.

use std::num::NonZeroU32;

use limiter::{Fraction, Quota, Rate};

use crate::MS;
use crate::fleet::Fleet;
use crate::random::Random;

pub(crate) struct Storm {
    burst: u32,
    /// The largest excess of any window over `rate * t`, in tokens, and what is allowed.
    pub(crate) excess: f64,
    pub(crate) excess_max: f64,
    pub(crate) log: Vec<String>,
}

const RATE: u64 = 2_000;
const TURNS: usize = 24;

impl Storm {
    pub(crate) fn blow(seed: u64) -> Storm {
        let mut random = Random::new(seed);
        let nodes = 1 + random.below(8) as u32;
        let burst = nodes * 2 + random.below([100, 1_000, 4_000][seed as usize % 3]) as u32;
        let rate = Rate::new(RATE, 1).expect("a rate");
        let quota = Quota::new(rate, NonZeroU32::new(burst).expect("not zero")).expect("a quota");
        let mut fleet = Fleet::new(quota, nodes, nodes, seed);
        fleet.keep_copies();
        // Shares follow those first who have no reserve to leave.
        let ordinary = Fraction::try_from(0.4).expect("a fraction");
        fleet.nodes.iter_mut().for_each(|node| node.reserve = [Fraction::ZERO, ordinary][random.below(2) as usize]);
        let log = vec![format!("{nodes} nodes, burst {burst}")];
        let mut storm = Storm { burst, excess: 0.0, excess_max: f64::from(burst), log };
        let mut demand = vec![0.0; nodes as usize];
        for _ in 0..TURNS {
            storm.turn(&mut fleet, &mut random);
            storm.restart(&mut fleet, &mut random, &demand);
            demand_anew(&mut demand, &mut random);
            // Short ones, so that nobody is silent for long; and long ones, in which a burst comes back.
            let lasts = [20, 60, 120, 200, 400, 1_200][random.below(6) as usize];
            storm.log.push(format!("{} ms: {demand:.0?} for {lasts} ms, {}", fleet.now() / MS, fleet.audit.worst));
            (0..lasts).for_each(|_| fleet.tick(|index| demand[index]));
        }
        storm.excess = fleet.audit.worst;
        storm
    }

    /// Some are killed, each on its own or all at once, and others take their place at once or soon, whoever is cut off
    /// meanwhile. What starts and is not answered lives on an equal part, whatever the dead had: so nothing is lost.
    fn restart(&mut self, fleet: &mut Fleet, random: &mut Random, demand: &[f64]) {
        if random.below(6) > 0 || fleet.wire.is_down || fleet.wire.lost > 0 || !fleet.all_are_known_for(0) {
            return;
        }
        let of_million = [200_000, 1_000_000][random.below(2) as usize];
        let is_doomed =
            |fleet: &Fleet, node: usize, random: &mut Random| !fleet.wire.cut_off[node] && random.chance(of_million);
        let doomed: Vec<usize> = (0..demand.len()).filter(|&node| is_doomed(fleet, node, random)).collect();
        doomed.iter().for_each(|&node| fleet.kill(node));
        let after = random.below(4) * random.below(150);
        (0..after).for_each(|_| fleet.tick(|index| demand[index]));
        doomed.iter().for_each(|&node| fleet.start(node));
        self.log.push(format!("{doomed:?} killed, started after {after} ms"));
    }

    fn turn(&mut self, fleet: &mut Fleet, random: &mut Random) {
        let what = random.below(12);
        match what {
            0 | 9 => fleet.wire.is_down = true,
            1 | 10 => fleet.wire.is_down = false,
            2 => {
                // What a new bucket, or an older one, never hears of, it cannot know: nobody is cut off from the beginning.
                fleet.wire.cut_off.fill(false);
                fleet.wire.is_down = false;
                fleet.lose_all();
            }
            3 | 4 if fleet.all_are_known_for(0) => {
                let of_million = [0, 300_000, 1_000_000][random.below(3) as usize];
                for cut_off in &mut fleet.wire.cut_off {
                    *cut_off = random.chance(of_million);
                }
            }
            5 => {
                fleet.redis_ahead += random.below(7_200_000_000).cast_signed() - 3_600_000_000;
                // A jump forward is worth 20 ms.
                self.excess_max += RATE as f64 * 0.02;
            }
            6 => fleet.wire.lost = [0, 10_000, 200_000][random.below(3) as usize],
            7 if fleet.all_are_known_for(1_100 * MS) => {
                fleet.wire.cut_off.fill(false);
                fleet.wire.is_down = false;
                fleet.lose_a_second();
                self.excess_max += f64::from((self.burst / 2).max(1));
            }
            _ => {}
        }
        let wire = &fleet.wire;
        let cut_off: Vec<u8> = wire.cut_off.iter().map(|&is| u8::from(is)).collect();
        self.log.push(format!("event {what}: down {}, cut off {cut_off:?}, lost {}", wire.is_down, wire.lost));
    }
}

/// Idle, within the share, and far above it: everybody alike, or each as it comes.
fn demand_anew(demand: &mut [f64], random: &mut Random) {
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
