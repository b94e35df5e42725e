"""The campaign: the same faults under eventbus, plain redis-py and FastStream, measured.

`python -m tests.faults.campaign` writes docs/reliability.json and the figures of
docs/reliability.md. `subjects` is the process that is watched, `stage` what stands around it,
`faults` what is done to it, `beats` what the beat costs, `page` how it is shown.
"""
