"""What happens in a worker process around a job's function.

`runtime` holds the pieces: `claimer` takes jobs, `settler` writes how they ended, `heart` renews their leases, `relay` rings for
what is due and `rescue` takes what the dead left behind, `watchdog` ends what runs too long. `middleware` is the list that
Dramatiq's broker gets, `child` runs native work where it can be killed.
"""
