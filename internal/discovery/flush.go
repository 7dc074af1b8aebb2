package discovery

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	bbolterrors "go.etcd.io/bbolt/errors"
)

// attach opens Options.File and takes in what it remembers. Without success memory
// alone goes on, and the next flush tries again.
func (s *Store) attach() {
	now := s.options.Now()
	f, err := s.openAndLoad(now)
	if errors.Is(err, errDamaged) {
		to, moveErr := setAside(s.options.File, now)
		if moveErr != nil {
			s.failed("discovery's store is damaged and cannot be renamed: what is observed is kept in memory alone", errors.Join(err, moveErr))
			return
		}
		s.options.Logger.Warn().Err(err).Str("file", s.options.File).Str("kept_as", to).
			Msg("discovery's store is damaged: it was renamed and a new one begun")
		f, err = s.openAndLoad(now)
	}
	switch {
	case errors.Is(err, bbolterrors.ErrTimeout):
		s.failed("another process has discovery's store: what is observed is kept in memory until that process gives it up", err)
		return
	case err != nil:
		s.failed("discovery's store cannot be opened: what is observed is kept in memory for now", err)
		return
	}
	s.open.Lock()
	s.file = f
	s.open.Unlock()
	s.history.clear()
	s.worked()
}

// openAndLoad opens the file and adds what it has to the table.
func (s *Store) openAndLoad(now time.Time) (*file, error) {
	f, err := openFile(s.options.File, false, now)
	if err != nil {
		return nil, err
	}
	if err := s.load(f); err != nil {
		f.abandon()
		return nil, err
	}
	return f, nil
}

// load adds what f has to the table. If the whole of f cannot be read, nothing is added.
func (s *Store) load(f *file) error {
	var entries []*entry
	uses := map[useKey]Use{}
	begun, err := f.load(func(e *entry) { entries = append(entries, e) }, func(k useKey, u Use) { uses[k] = u })
	if err != nil {
		return err
	}
	s.since.Store(min(s.since.Load(), begun.Unix()))
	for k, u := range uses {
		if to := s.table.uses.get(k); !to.lost {
			to.hits.Add(u.Hits)
			to.last.Store(max(to.last.Load(), uint32(u.LastUsed.Unix())))
		}
	}
	for i, e := range entries {
		s.lastID = max(s.lastID, e.id)
		s.table.restore(e, i >= s.options.Entries)
	}
	return nil
}

// restore adds e, which was in a file, to what is known. Others make room for it if it
// is one too many. Otherwise they do not, although it may find its shard full: names are
// spread anew at each start, never quite evenly, and nothing is to be lost by that.
func (t *table) restore(e *entry, tooMany bool) {
	i := identity{
		group: e.group(), rule: e.ruleID(), name: []byte(e.name), port: e.port, qtype: e.qtype,
		protocol: e.protocol, verdict: e.verdict, reason: e.reason,
	}
	sh, h := t.find(&i)
	e.hash = h
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for old := sh.index[h]; old != nil; old = old.next {
		if old.is(&i) {
			old.absorb(e)
			return
		}
	}
	e.rule = t.uses.get(e.rule.key)
	if tooMany && len(sh.index) > 0 {
		t.evict(sh, e.class(), e.last)
	}
	sh.insert(e)
}

// absorb adds what was, from the file, had counted before e began to count in memory.
func (e *entry) absorb(was *entry) {
	e.id, e.before = was.id, nil
	e.total.add(was.total)
	if e.day == was.day {
		e.today.add(was.today)
	}
	e.sources.merge(&was.sources)
	e.first, e.last = min(e.first, was.first), max(e.last, was.last)
	e.listeners |= was.listeners
	e.dirty = true
}

// failed notes that the file could not be written, and tells so once.
func (s *Store) failed(message string, err error) {
	s.writeErrors.Add(1)
	if !s.failing {
		s.options.Logger.Warn().Err(err).Str("file", s.options.File).Msg(message)
	}
	s.failing = true
}

// worked notes that the file could be written.
func (s *Store) worked() {
	if s.failing {
		s.options.Logger.Info().Str("file", s.options.File).Msg("discovery's store is written again")
	}
	s.failing = false
}

// flush writes what has changed and removes what is too old.
func (s *Store) flush() {
	s.writing.Lock()
	defer s.writing.Unlock()
	now := s.options.Now()
	if s.options.File != "" && s.file == nil {
		s.attach()
	}
	err := s.expire(now)
	if s.file == nil {
		s.keepDays()
		return
	}
	if err == nil {
		err = s.write()
	}
	switch {
	case err == nil:
		s.writes.Add(1)
		s.lastWrite.Store(now.Unix())
		s.worked()
	case errors.Is(err, errDamaged):
		s.replace(err, now)
	default:
		s.failed("discovery's store cannot be written: what is observed is kept in memory for now", err)
	}
}

// replace sets a file aside that turned out to be damaged, and begins a new one with what
// memory has. The traffic of single days is lost.
func (s *Store) replace(cause error, now time.Time) {
	s.open.Lock()
	s.file.abandon()
	s.file = nil
	s.open.Unlock()
	to, err := setAside(s.options.File, now)
	if err != nil {
		s.failed("discovery's store is damaged and cannot be renamed: what is observed is kept in memory alone", errors.Join(cause, err))
		return
	}
	s.writeErrors.Add(1)
	s.options.Logger.Warn().Err(cause).Str("file", s.options.File).Str("kept_as", to).
		Msg("discovery's store is damaged: it was renamed and a new one begun with what memory has; earlier days are not told apart any more")
	s.table.each(func(e *entry) { e.dirty = true })
	for _, u := range s.table.uses.all() {
		u.dirty.Store(true)
	}
}

// keepDays keeps the traffic of days that are over in memory.
func (s *Store) keepDays() {
	s.table.each(func(e *entry) {
		if e.before == nil {
			return
		}
		if e.id == 0 {
			s.lastID++
			e.id = s.lastID
		}
		s.history.put(e.id, *e.before)
		e.before = nil
	})
	s.table.takeRemoved() // nothing has rows in a file
}

// expire forgets what is older than Options.Retention, once a day.
func (s *Store) expire(now time.Time) error {
	today := dayOf(now)
	if s.tidied == today {
		return nil
	}
	s.tidied = today
	oldest := dayOf(now.Add(-s.options.Retention))
	limit := uint32(max(now.Add(-s.options.Retention).Unix(), 0))
	s.table.expire(limit)
	s.history.tidy(oldest)
	old := s.table.uses.expire(limit)
	if s.file == nil {
		return nil
	}
	if err := errors.Join(s.file.tidy(oldest), s.file.remove(nil, old)); err != nil {
		s.tidied = 0
		return fmt.Errorf("remove what is too old: %w", err)
	}
	return nil
}

// expire forgets the entries that were last seen before limit.
func (t *table) expire(limit uint32) {
	for i := range t.shards {
		sh := &t.shards[i]
		for c := range classes {
			for from := 0; ; from++ {
				sh.mu.Lock()
				if from >= len(sh.byClass[c]) {
					sh.mu.Unlock()
					break
				}
				if e := sh.byClass[c][from]; e.last < limit {
					sh.remove(e)
					from-- // another has taken its place
				}
				sh.mu.Unlock()
			}
		}
	}
}

// takeRemoved returns what has been removed since the last time.
func (t *table) takeRemoved() (all []removal) {
	for i := range t.shards {
		sh := &t.shards[i]
		sh.mu.Lock()
		all = append(all, sh.removed...)
		sh.removed = nil
		sh.mu.Unlock()
	}
	return all
}

// write writes what has changed to the file. What cannot be written is tried again the
// next time.
func (s *Store) write() error {
	removed := s.table.takeRemoved()
	slices.SortFunc(removed, func(a, b removal) int { return cmp.Compare(a.id, b.id) })
	for part := range slices.Chunk(removed, batch) {
		if err := s.file.remove(part, nil); err != nil {
			s.table.giveBack(removed)
			return fmt.Errorf("remove: %w", err)
		}
	}
	var dirty []*entry
	s.table.each(func(e *entry) {
		if !e.dirty {
			return
		}
		if e.id == 0 {
			s.lastID++
			e.id = s.lastID
		}
		dirty = append(dirty, e)
	})
	slices.SortFunc(dirty, func(a, b *entry) int { return cmp.Compare(a.id, b.id) })
	dirty = slices.Compact(dirty) // each may meet one twice
	copies := make([]entry, 0, min(batch, len(dirty)))
	for part := range slices.Chunk(dirty, batch) {
		copies = s.table.copyDirty(copies[:0], part)
		if err := s.file.write(copies); err != nil {
			s.table.mark(part)
			return fmt.Errorf("write pairs: %w", err)
		}
		s.table.forgetDays(part, copies)
	}
	if err := s.writeUses(); err != nil {
		return fmt.Errorf("write rules: %w", err)
	}
	return nil
}

// giveBack has removed tried again.
func (t *table) giveBack(removed []removal) {
	sh := &t.shards[0]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if len(sh.removed)+len(removed) <= t.room*len(t.shards) { // what stays in the file for nothing goes when it expires
		sh.removed = append(sh.removed, removed...)
	}
}

// copyDirty appends copies of those of part that are still there, and takes them for written.
func (t *table) copyDirty(copies []entry, part []*entry) []entry {
	for _, e := range part {
		sh := t.shardOf(e)
		sh.mu.Lock()
		if !e.gone {
			e.dirty = false
			copies = append(copies, *e)
		}
		sh.mu.Unlock()
	}
	return copies
}

// mark has part written again.
func (t *table) mark(part []*entry) {
	for _, e := range part {
		sh := t.shardOf(e)
		sh.mu.Lock()
		e.dirty = true
		sh.mu.Unlock()
	}
}

// forgetDays drops the days before that were written.
func (t *table) forgetDays(part []*entry, copies []entry) {
	i := 0
	for _, e := range part {
		if i == len(copies) || copies[i].id != e.id {
			continue // it was gone
		}
		if before := copies[i].before; before != nil {
			sh := t.shardOf(e)
			sh.mu.Lock()
			if e.before == before {
				e.before = nil
			}
			sh.mu.Unlock()
		}
		i++
	}
}

// writeUses writes the rules whose use has changed.
func (s *Store) writeUses() error {
	part := make(map[useKey]*use, batch)
	for k, u := range s.table.uses.all() {
		if !u.dirty.Swap(false) {
			continue
		}
		if part[k] = u; len(part) == batch {
			if err := s.writePart(part); err != nil {
				return err
			}
			clear(part)
		}
	}
	return s.writePart(part)
}

// writePart writes some rules.
func (s *Store) writePart(part map[useKey]*use) error {
	if len(part) == 0 {
		return nil
	}
	err := s.file.writeUses(part)
	if err != nil {
		for _, u := range part {
			u.dirty.Store(true)
		}
	}
	return err
}

// all returns the uses there are now.
func (us *uses) all() map[useKey]*use {
	us.mu.Lock()
	defer us.mu.Unlock()
	out := make(map[useKey]*use, len(us.known))
	for k, u := range us.known {
		out[k] = u
	}
	return out
}

// expire forgets rules that were last used before limit, if room is short: when a rule
// was used last is what people want to know of those that are not.
func (us *uses) expire(limit uint32) (old []useKey) {
	us.mu.Lock()
	defer us.mu.Unlock()
	if len(us.known) < us.room/10*9 {
		return nil
	}
	for k, u := range us.known {
		if u.last.Load() < limit {
			old = append(old, k)
			delete(us.known, k)
		}
	}
	return old
}

// OpenReadOnly returns a Store with what the file at path remembers, for a look at it
// while no process has it. Nothing is written. Close it.
func OpenReadOnly(path string) (*Store, error) {
	s := newStore(Options{File: path, Entries: math.MaxInt32, Retention: DefaultRetention, Now: time.Now})
	f, err := openFile(path, true, time.Time{})
	if err == nil {
		s.file = f
		if err = s.load(f); err != nil {
			f.abandon()
		}
	}
	switch {
	case errors.Is(err, bbolterrors.ErrTimeout):
		return nil, fmt.Errorf("discovery: %s: a running process has it; ask that with --admin: %w", path, err)
	case err != nil:
		return nil, fmt.Errorf("discovery: %s: %w", path, err)
	}
	return s, nil
}
