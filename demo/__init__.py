"""The demonstration: real brain anatomy, made into a small BMAD-layout data set, and the tiny model that runs on it."""
