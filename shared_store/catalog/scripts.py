"""The catalog's writes, as Lua scripts that the server runs atomically.

Relies on Redis 5 or later (scripts replicate by their effects, so ``TIME`` and ``SPOP`` may precede a write) and on
a single server with all keys: ``SWEEP`` computes names of keys, which Redis Cluster does not allow.

Every script that writes for a node starts with a fence: the node's hash must have the epoch of the writer. The fence
prevents a store that hung from overwriting its successor, and detects that the server lost the data. A script answers
``ok``, ``lost`` (rewrite everything, beginning with ``CLAIM``) or ``fenced``.

A full server refuses a script whose first write needs memory, and allows all writes of a script whose first one does
not. Therefore scripts that add entries begin with a write that needs memory. Scripts that must succeed on a full server
(claim, renew, drop) begin with one that does not.
"""

from __future__ import annotations

# KEYS[1]: the node's hash. ARGV[1]: epoch. ARGV[2]: time to live in ms.
_FENCE = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 'lost' end
"""

# Every write renews the time to live: a large snapshot over a slow network may take longer than a heartbeat.
_ALIVE = """
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 'ok'
"""

# The server's clock is used, so that nodes with different clocks agree on which nodes are alive.
_HEARTBEAT = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
redis.call('HSET', KEYS[1], 'heartbeat', string.format('%.3f', now))
redis.call('ZADD', KEYS[2], string.format('%.3f', now + tonumber(ARGV[2]) / 1000), ARGV[3])
return 'ok'
"""

# KEYS: node, nodes. ARGV: epoch, ttl, node, started_at, then fields and values of the node's hash.
# A hash of another epoch is replaced if that run started earlier (tie: if its epoch is smaller), else obeyed.
CLAIM = (
    """
local held = redis.call('HMGET', KEYS[1], 'epoch', 'started_at')
if held[1] and held[1] ~= ARGV[1] then
  local theirs, ours = tonumber(held[2]), tonumber(ARGV[4])
  if theirs > ours or (theirs == ours and held[1] > ARGV[1]) then return 'fenced' end
  redis.call('DEL', KEYS[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
    + _HEARTBEAT
)

# KEYS: node, nodes, models, blobs, leases, then every model's hash.
# ARGV: epoch, ttl, node, and the expected numbers of models, blobs and leases.
RENEW = (
    _FENCE
    + """
if redis.call('SCARD', KEYS[3]) ~= tonumber(ARGV[4])
  or redis.call('SCARD', KEYS[4]) ~= tonumber(ARGV[5])
  or redis.call('HLEN', KEYS[5]) ~= tonumber(ARGV[6]) then return 'lost' end
for i = 6, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then return 'lost' end
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[5], ARGV[2])
"""
    + _HEARTBEAT
)

# KEYS: node, models, the model's hash. ARGV: epoch, ttl, model key, then fields and values.
PUT_MODEL = (
    _FENCE
    + """
redis.call('HSET', KEYS[3], unpack(ARGV, 4))
redis.call('SADD', KEYS[2], ARGV[3])
"""
    + _ALIVE
)

# KEYS: node, models, the model's hash. ARGV: epoch, ttl, model key.
DROP_MODEL = (
    _FENCE
    + """
redis.call('DEL', KEYS[3])
redis.call('SREM', KEYS[2], ARGV[3])
"""
    + _ALIVE
)

# KEYS: node, the node's blobs, then each blob's hash. ARGV: epoch, ttl, node, then digest and size of each.
ADD_BLOBS = (
    _FENCE
    + """
for i = 3, #KEYS do
  local digest = 2 * i - 2
  redis.call('HSET', KEYS[i], ARGV[3], ARGV[digest + 1])
  redis.call('SADD', KEYS[2], ARGV[digest])
end
"""
    + _ALIVE
)

# KEYS: node, the node's blobs, then each blob's hash. ARGV: epoch, ttl, node, then the digest of each.
DROP_BLOBS = (
    _FENCE
    + """
for i = 3, #KEYS do
  redis.call('HDEL', KEYS[i], ARGV[3])
  redis.call('SREM', KEYS[2], ARGV[i + 1])
end
"""
    + _ALIVE
)

# KEYS: node, leases. ARGV: epoch, ttl, how many to drop, their clients, then client and JSON of each to put.
PUT_LEASES = (
    _FENCE
    + """
local first_put = 4 + tonumber(ARGV[3])
for i = first_put, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
for i = 4, first_put - 1 do redis.call('HDEL', KEYS[2], ARGV[i]) end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
"""
    + _ALIVE
)

# KEYS: node, events. ARGV: epoch, ttl, sequence number, longest stream, then fields and values.
# The node's hash has the last number, so that a batch that is resent after a time-out adds nothing twice.
ADD_EVENT = (
    _FENCE
    + """
local last = tonumber(redis.call('HGET', KEYS[1], 'last_event') or 0)
if tonumber(ARGV[3]) <= last then return 'ok' end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', unpack(ARGV, 5))
redis.call('HSET', KEYS[1], 'last_event', ARGV[3])
"""
    + _ALIVE
)

# KEYS: node, nodes, leases. ARGV: epoch, ttl, node. A sweep removes the rest; the score makes it due at once.
RELEASE = (
    _FENCE
    + """
redis.call('DEL', KEYS[1], KEYS[3])
redis.call('ZADD', KEYS[2], 0, ARGV[3])
return 'ok'
"""
)

# KEYS: node, nodes, models, blobs, leases. ARGV: node, prefix of its models, prefix of blobs, how many blobs at once.
# For a node that is gone, from any node. Answers 1 while entries remain.
SWEEP = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
for _, key in ipairs(redis.call('SMEMBERS', KEYS[3])) do redis.call('DEL', ARGV[2] .. key) end
redis.call('DEL', KEYS[3], KEYS[5])
for _, digest in ipairs(redis.call('SPOP', KEYS[4], ARGV[4])) do redis.call('HDEL', ARGV[3] .. digest, ARGV[1]) end
if redis.call('EXISTS', KEYS[4]) == 1 then return 1 end
redis.call('ZREM', KEYS[2], ARGV[1])
return 0
"""
