"""The runtimes that run a build, each in a process of its own."""
