"""What a kernel does, told a second time: schedules as explicit programs, a simulator that runs them, and ways to break them.

It trusts neither the proof nor the search: nothing here imports `mkdsl.schedule`'s rules or `mkdsl.proof`. Only `sources` asks the search, for
schedules to start from.
"""
