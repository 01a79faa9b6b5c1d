"""The tests, a folder for each room of the code; `tests/testing` is what they share."""
