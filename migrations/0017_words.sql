-- Words are searched right after they are written: a list of what is not yet in the index would be read whole for each word.
alter index agentflow.chunks_by_lexeme set (fastupdate = off);
select gin_clean_pending_list('agentflow.chunks_by_lexeme');
