"""Examples of a skill that is added to a bundle."""

PARROT = [f"Repeat after me the word {word}" for word in "sun moon star tree lake hill".split()]
PARROT += [f"Repeat after me the number {number}" for number in range(14)]
