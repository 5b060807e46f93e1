"""`agentflow prove`: a private copy of the whole system under load, hurt in every way we know of, and its history checked.

agentflow.prove.plan       what is asked for, and when each fault comes: the same for the same seed
agentflow.prove.servers    the servers of the copy: Postgres and Valkey in a home of its own; agentflow.prove.rabbitmq
agentflow.prove.crew       its processes: web, workers, scheduler; started again when they die
agentflow.prove.kinds      job types that only its workers know, for effects that can be counted
agentflow.prove.load       who hands work in, and writes down what was accepted; agentflow.prove.requests what that is
agentflow.prove.receiver   who gets callbacks and effects, and counts them
agentflow.prove.faults     what is done to it
agentflow.prove.history    the recorder: every change of every job's row
agentflow.prove.checker    what must be true of all that; knows the rules, not the code
agentflow.prove.report     the figures, as JSON; agentflow.prove.page as a picture
agentflow.prove.run        one run, from start to report
agentflow.prove.staging    load and checks over the API alone, for a system by URL
agentflow.prove.measuring  the same as a load test: how long it takes (`agentflow load`)
agentflow.prove.soak       half an hour of load, and whether anything grows

Reached from agentflow/cli/ only, which also has the two modules that put prove's job types into worker and web.
"""
