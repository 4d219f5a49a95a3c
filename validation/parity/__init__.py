"""Whether runtimes make the checkpoint's tokens of a text, and its text of tokens and chats."""
