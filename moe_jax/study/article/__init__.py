"""The article's claims and their answers, from the result files of the experiments.

`numbers` looks figures up by name, `claims` reads the data file, `levers` runs the experiments,
`markdown`, `page` and `documents` write what a person reads.
"""
