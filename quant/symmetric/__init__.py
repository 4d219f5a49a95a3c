"""The symmetric grid: one scale a group, zero in the middle of the codes."""
