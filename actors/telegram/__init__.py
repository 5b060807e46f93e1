"""What the bot does: `begin` a request that was made, `follow` its render, `deliver` the result, what a `press` of a button asks
for; `say` and `send_file` are messages by themselves."""
