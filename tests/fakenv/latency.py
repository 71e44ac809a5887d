# SPDX-License-Identifier: Apache-2.0
"""Prints what a pause costs on the fake: DISABLE_CHANNELS of a running victim until the control returns,
which is when its kernel has stopped. Figures of the fake say nothing about a GPU.

    python tests/fakenv/latency.py [cycles]
"""

from __future__ import annotations

import sys

import fakenv

VICTIM = "import rm, driver_api; cu = driver_api.Cuda(); cu.launch('spin_us', 600_000_000)"
AGENT = """
import rm, time
c = rm.Client(fd=fds[0], handle={client})
subdevice, channels = rm.subdevice_of(c), {channels}
pauses, resumes = [], []
for cycle in range({cycles}):
    start = time.monotonic_ns(); assert c.disable(subdevice, channels) == 0
    pauses.append((time.monotonic_ns() - start) / 1000)
    start = time.monotonic_ns(); assert c.disable(subdevice, channels, on=False) == 0
    resumes.append((time.monotonic_ns() - start) / 1000)
    time.sleep(0.001)
result = [sorted(pauses), sorted(resumes)]
"""


def main() -> None:
    cycles = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with fakenv.Machine(fakenv.build()) as machine:
        victim, agent = machine.actor(), machine.actor()
        victim.run(VICTIM)
        status = machine.status()
        victim.run(f"give = rm.descriptors({[f['inode'] for f in status['files'] if f['kind'] == 'ctl']})")
        channels = [c["handle"] for c in status["channels"] if c["engine"] == 1]
        client = status["clients"][0]["handle"]
        samples = agent.run(AGENT.format(client=client, channels=channels, cycles=cycles), tuple(victim.fds))
        for what, us in zip(("pause (8 channels, evicted)", "resume"), samples, strict=True):
            p50, p99 = us[len(us) // 2], us[len(us) * 99 // 100]
            print(f"{what:30} p50 {p50:7.1f} us   p99 {p99:7.1f} us   max {us[-1]:8.1f} us   n {len(us)}")


if __name__ == "__main__":
    main()
