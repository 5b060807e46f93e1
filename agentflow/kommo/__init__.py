"""Kommo (amoCRM) accounts: their tokens, their API, and the mirror of what is in them.

accounts   the accounts and what is due          tokens   the token to call with, bought anew in time
client     one call, within the account's limits  entities what is mirrored, and how it is read
mirror     things, tombstones, events, drift      cursors  how far each kind was read
touched    what is to be read again by its id     runs     the log of runs
writes     what was written back                  walking  reading lists that change meanwhile
hosts      which addresses are Kommo's
"""
