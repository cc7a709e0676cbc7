"""`python -m flyweight`, where no script was installed."""

from flyweight.cli import program

program()
