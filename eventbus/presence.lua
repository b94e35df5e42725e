-- Presence, as Redis keeps it (eventbus/presence.py says why). KEYS: BASE. ARGV: verb, what goes before
-- a user to make the channel, an epoch for fresh data, ttl in ms; then node, linger in ms, number of
-- sessions (-1: do not compare), how many sessions to change at most; then op, session, user, value.
--
-- Keys: BASE:state (epoch, born, version, beat, grace), :online (users that were announced),
-- :leaving (users whose last session is gone, and when to say so), :nodes (alive until), :dead (being
-- swept), :node:N (session -> user), :user:U (session -> "since meta"). Times are Redis's own, in ms.
local base, verb, channel, ttl = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[4])
local node, linger, total, limit = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local state, online, leaving = base .. ':state', base .. ':online', base .. ':leaving'
local nodes, dead, call = base .. ':nodes', base .. ':dead', redis.call
local clock = call('TIME')
local seconds, now = tonumber(clock[1]), clock[1] * 1000 + math.floor(clock[2] / 1000)
if call('HSETNX', state, 'epoch', ARGV[3]) == 1 then call('HSET', state, 'born', now) end
local epoch = call('HGET', state, 'epoch')
local age = now - call('HGET', state, 'born')

local function stamp()
  local f, day, rest = math.floor, math.floor(seconds / 86400) + 719468, seconds % 86400
  local era = f(day / 146097)
  local doe = day - era * 146097
  local yoe = f((doe - f(doe / 1460) + f(doe / 36524) - f(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + f(yoe / 4) - f(yoe / 100))
  local mp = f((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', yoe + era * 400
    + (month <= 2 and 1 or 0), month, doy - f((153 * mp + 2) / 5) + 1,
    f(rest / 3600), f(rest % 3600 / 60), rest % 60, clock[2])
end
local function announce(kind, user, more)
  call('PUBLISH', channel .. user, '{"specversion":"1.0","id":"'
    .. call('HINCRBY', state, 'version', 1) .. '","source":"presence/' .. epoch .. '","type":"'
    .. kind .. '","time":"' .. stamp() .. '","data":{"user":' .. cjson.encode(user) .. more .. '}}')
end
local function offline(user)
  if call('SISMEMBER', online, user) == 1 then announce('UserOffline', user, '') end
  call('SREM', online, user)
  call('ZREM', leaving, user)
end
local function drop(owner, session, user, after)
  call('HDEL', base .. ':node:' .. owner, session)
  local key = base .. ':user:' .. user
  if call('HDEL', key, session) == 0 or call('EXISTS', key) == 1 then return end
  if after > 0 then call('ZADD', leaving, now + after, user) else offline(user) end
end
local function join(session, user, value, again)
  if call('SISMEMBER', online, user) == 0 then
    -- Redis lost its data and everybody signs in again: no news, but views must read again.
    if again and age < ttl then call('HINCRBY', state, 'version', 1)
    else announce('UserOnline', user, ',"meta":' .. string.match(value, ' (.*)')) end
    call('SADD', online, user)
  end
  call('ZREM', leaving, user)
  call('HSET', base .. ':user:' .. user, session, value)
  call('HSET', base .. ':node:' .. node, session, user)
end
local function sweep()
  local last, more = tonumber(call('HGET', state, 'beat') or 0), 0
  if now - last > ttl * 3 / 8 then  -- nobody came through: all may come back first
    call('HSET', state, 'grace', now + ttl)
  end
  call('HSET', state, 'beat', now)
  for _, user in ipairs(call('ZRANGEBYSCORE', leaving, '-inf', now, 'LIMIT', 0, limit)) do
    offline(user)
    limit = limit - 1
  end
  if now >= tonumber(call('HGET', state, 'grace') or 0) then
    for _, gone in ipairs(call('ZRANGEBYSCORE', nodes, '-inf', now)) do
      call('ZREM', nodes, gone)
      call('SADD', dead, gone)
    end
  end
  for _, gone in ipairs(call('SMEMBERS', dead)) do
    local cursor = '0'
    repeat
      if limit <= 0 then return 1 end
      local page = call('HSCAN', base .. ':node:' .. gone, cursor, 'COUNT', 100)
      cursor = page[1]
      for i = 1, #page[2], 2 do drop(gone, page[2][i], page[2][i + 1], 0) end
      limit = limit - #page[2] / 2
    until cursor == '0'
    call('SREM', dead, gone)
  end
  return limit <= 0 and 1 or 0
end
local graced = now < tonumber(call('HGET', state, 'grace') or 0)
local function alive(session)
  local due = call('ZSCORE', nodes, string.match(session, '^(.*):'))
  return due and (graced or tonumber(due) > now)
end

if verb == 'sync' or verb == 'resync' then
  local known = call('ZSCORE', nodes, node) or total == 0 or verb == 'resync'
  if known or #ARGV > 8 then
    call('ZADD', nodes, now + ttl, node)
    call('SREM', dead, node)
  end
  for i = 9, #ARGV, 4 do
    local op, session, user = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    if op == '-' then drop(node, session, user, linger)
    else join(session, user, ARGV[i + 3], op == '=') end
  end
  if total >= 0 and call('HLEN', base .. ':node:' .. node) ~= total then known = false end
  local more = sweep()
  local first = call('ZRANGE', leaving, 0, 0, 'WITHSCORES')
  return {known and 1 or 0, more, epoch, tonumber(call('HGET', state, 'version') or 0),
    first[2] and math.max(0, first[2] - now) or -1}
elseif verb == 'quit' then
  call('ZREM', nodes, node)
  if call('ZCOUNT', nodes, now, '+inf') > 0 then return 0 end  -- the others see to those who leave
  local left = call('ZRANGE', leaving, 0, limit - 1)
  for _, user in ipairs(left) do offline(user) end
  return #left
elseif verb == 'own' then
  return call('HGETALL', base .. ':node:' .. node)
elseif verb == 'read' then
  return {epoch, tonumber(call('HGET', state, 'version') or 0), age, call('SMEMBERS', online)}
elseif verb == 'get' then
  local found, all = {}, call('HGETALL', base .. ':user:' .. node)
  for i = 1, #all, 2 do
    if alive(all[i]) then found[#found + 1], found[#found + 2] = all[i], all[i + 1] end
  end
  return found
end
local gone, silent, found = {}, call('SMEMBERS', dead), {}
if not graced then
  for _, name in ipairs(call('ZRANGEBYSCORE', nodes, '-inf', now)) do silent[#silent + 1] = name end
end
for _, user in ipairs(call('ZRANGE', leaving, 0, -1)) do gone[user] = true end
for _, name in ipairs(silent) do
  for _, user in ipairs(call('HVALS', base .. ':node:' .. name)) do
    gone[user] = true
    for _, session in ipairs(call('HKEYS', base .. ':user:' .. user)) do
      if alive(session) then gone[user] = nil end
    end
  end
end
for _, user in ipairs(call('SMEMBERS', online)) do
  if not gone[user] then found[#found + 1] = user end
end
return found
