"""What each command of `mole` does: a function takes the parsed options, prints, and raises `MoleError` on failure."""
