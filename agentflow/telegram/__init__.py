"""The Telegram bot: somebody sends a picture and what to make of it, and gets the render back.

client         calls of the Bot API: its limits, and what its refusals mean
bots           whose bot it is, and the webhook endpoint that its updates come by
updates        what somebody did, out of an update
conversation   what follows from it: rows and jobs, in the transaction that handles the update
requests       what was asked for, as rows
pictures       what was sent, fetched into storage
delivery       the one message about a request: sent, edited, made the result
shown          what that message shows now (in Redis: to lose it costs an edit)
texts          what the bot says, in Russian and English
polling        updates by asking for them, where nobody can reach us
"""
