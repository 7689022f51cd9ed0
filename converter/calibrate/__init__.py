"""Where ranges come from: data, sessions, statistics, the walk."""
