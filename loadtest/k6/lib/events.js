// Events of a run: moments at which something is done to the environment while the load runs. A
// script announces each one with a line `event: NAME: INSTRUCTION`. The runner (`loadtest/k6/run`)
// then acts by its name; of your own gateway, do what the line says, or give the runner a command
// for it (`--on NAME=COMMAND`).

import { sleep } from 'k6';

let planned = [];

// The scenario that announces `plan`: items of second, name and instruction. The script has to
// export `announce`.
export function events(plan) {
  planned = [...plan].sort((one, other) => one[0] - other[0]);
  const last = planned.length > 0 ? planned[planned.length - 1][0] : 0;
  return {
    executor: 'per-vu-iterations', exec: 'announce', vus: 1, iterations: 1, maxDuration: `${last + 30}s`, gracefulStop: '1s',
  };
}

export function announce() {
  const began = Date.now();
  for (const [second, name, instruction] of planned) {
    sleep(Math.max(0, second - (Date.now() - began) / 1000));
    console.log(`event: ${name}: ${instruction}`);
  }
}
