"""The command `hagmoe`: one verb, one library call."""
