# SPDX-License-Identifier: Apache-2.0
"""`valve demo`: two real LLM engines on one device, measured with and without Valve.

main.py       command line, order of the phases, exit status
trace.py      arrivals from a trace file          prompts.py   real text of exact length
loadgen.py    the online load, timed per token    offline_driver.py   the offline batch (engine's Python)
engines.py    the two engines as processes        phases.py    exclusive, alone, naive
valve_phase.py  agent, `valve run`, the Valve phase
events.py     the agent's event log               stats.py, measure.py   figures
report.py     report.json's models                summary.py, page.py    what people see
display.py    live progress                       settings.py  every constant of the run
"""
