-- The tables of a training service. An answer does not write the body again, because that has its own table; folders are
-- relative to that of the service.

CREATE TABLE sessions(key TEXT PRIMARY KEY, owner TEXT, metadata TEXT,
    created REAL, seen REAL, -- a heartbeat, or when the service was started
    ended REAL, -- when it was finished or had lapsed; a lapsed session goes on with its next call
    finished INTEGER DEFAULT 0);
CREATE TABLE models(model TEXT PRIMARY KEY, owner TEXT, session TEXT REFERENCES sessions, "create" BLOB, info TEXT,
    created REAL,
    saved INTEGER DEFAULT -1, folder TEXT DEFAULT '' -- of the saved state: the number of its last operation, its folder
    );
CREATE TABLE samplers(key TEXT PRIMARY KEY, owner TEXT, session TEXT REFERENCES sessions, number INTEGER, path TEXT,
    folder TEXT, used REAL);
CREATE INDEX sampler_numbers ON samplers(session, number);
CREATE TABLE weights(key TEXT PRIMARY KEY, owner TEXT, model TEXT, folder TEXT, size INTEGER, created REAL,
    expires REAL, sampler TEXT, "create" BLOB);
CREATE TABLE operations(request TEXT PRIMARY KEY, owner TEXT,
    queue TEXT, -- the model, or the sampler of a sample
    number INTEGER, kind TEXT, -- name of the operation's type
    backward INTEGER, -- whether it is a pass that adds gradients
    folder TEXT, -- which it reads or writes
    size INTEGER, -- bytes of its body and result
    extra TEXT, -- what the client is told with the result, in JSON
    result_kind TEXT DEFAULT '', taken REAL, -- when the client fetched the answer
    crashes INTEGER DEFAULT 0, -- how often the engine ended while it ran this
    UNIQUE(queue, number));
CREATE INDEX waiting ON operations(kind) WHERE result_kind = '';
CREATE INDEX ends_of_windows ON operations(queue, number) WHERE kind IN ('Step', 'Load');
CREATE INDEX passes ON operations(queue, number) WHERE backward;
CREATE TABLE sizes(owner TEXT PRIMARY KEY, queued INTEGER, kept INTEGER); -- of operations without a result, and of all
CREATE TRIGGER queues AFTER INSERT ON operations BEGIN
    INSERT INTO sizes SELECT NEW.owner, 0, 0 WHERE NOT EXISTS (SELECT 1 FROM sizes WHERE owner = NEW.owner);
    UPDATE sizes SET queued = queued + NEW.size, kept = kept + NEW.size WHERE owner = NEW.owner; END;
CREATE TRIGGER answers AFTER UPDATE OF result_kind ON operations
    BEGIN UPDATE sizes SET queued = queued - OLD.size, kept = kept + NEW.size - OLD.size WHERE owner = NEW.owner; END;
CREATE TRIGGER drops AFTER DELETE ON operations
    BEGIN UPDATE sizes SET queued = queued - OLD.size * (OLD.result_kind = ''), kept = kept - OLD.size
    WHERE owner = OLD.owner; END;
CREATE TABLE bodies(request TEXT PRIMARY KEY REFERENCES operations ON DELETE CASCADE, value BLOB);
CREATE TABLE results(request TEXT PRIMARY KEY REFERENCES operations ON DELETE CASCADE, value BLOB);
