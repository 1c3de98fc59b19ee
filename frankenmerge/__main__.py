"""`python -m frankenmerge`, and what `accelerate launch -m frankenmerge` runs in every process."""

from frankenmerge.cli import main

main()
