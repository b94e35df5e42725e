"""What a message costs: eventbus, the floors under it and the peers beside it, in turn.

    python -m benchmarks                    every section, 5 rounds -> docs/benchmarks.json
    python -m benchmarks --quick            receive and publish, under 45 s
    python -m benchmarks --profile          where the time of one message goes, stage by stage
    python -m benchmarks.plot docs/benchmarks.json docs/benchmarks.svg

How a number comes about. Every run of every row has a fresh server and a fresh Python process; rows
of one section alternate (A B C A B C ...), so a machine that slows down slows all of them, and the
median of the runs counts. Absolute numbers belong to the machine; the ratios are what we promise.

Arrows: workload, meter, server <- flood, receivers, publishers, latencies (processes)
        <- rows, imports, profile <- targets, report <- __main__; plot reads the JSON only.
"""
