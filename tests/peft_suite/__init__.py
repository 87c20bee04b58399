"""PEFT's own tests, run with a `MoleConfig` of every router wherever they say `LoraConfig`.

make test-peft                                      # all; PYTHONPATH=tests python -m peft_suite --help for less

`source` downloads the tests, and `hub` makes the models that they ask for. `plugin` is the pytest plug-in that puts
`stand_in.StandIn` in place of `peft.LoraConfig`. `verdicts` says which tests are refused on purpose or do not apply,
with the reasons, and `tally` counts them.
"""
