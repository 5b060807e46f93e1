"""Copies of a whole system, and systems from copies: what Postgres holds, and the files in storage. Nothing else has to be kept:
RabbitMQ and Redis hold rings and scratch, which are made again from Postgres.

agentflow.backup.making     a backup, of a system that goes on working
agentflow.backup.restoring  a system, of a backup
agentflow.backup.place      where backups lie: a folder or a bucket, and what stands where in it
agentflow.backup.manifest   what a backup says of itself, written last
agentflow.backup.tables     rows out of Postgres and into it
agentflow.backup.copying    one file from one storage into another
agentflow.backup.packing    compressed parts with their checksums
agentflow.backup.guard      one backup at a time, and no file is removed meanwhile
"""
