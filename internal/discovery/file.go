package discovery

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

const (
	formatVersion = 1
	// lockPatience is how long another process may take to give the file up.
	lockPatience = 2 * time.Second
	// batch is the number of entries written in one transaction: it bounds the memory
	// that takes.
	batch = 4096
)

var (
	bucketMeta  = []byte("meta")  // format, begun
	bucketPairs = []byte("pairs") // by ID
	bucketRules = []byte("rules")
	bucketDays  = []byte("days") // by date, in each by ID of the pair

	keyFormat = []byte("format")
	keyBegun  = []byte("begun")
)

// errDamaged is wrapped by errors that say that the file is no good, rather than that
// it cannot be reached.
var errDamaged = errors.New("the file is damaged")

// A file is the embedded store. Its methods return errors for everything that may be
// wrong with it, panics and page faults of the library included: a file may be cut short
// or overwritten at any time.
type file struct {
	db     *bbolt.DB
	handle *os.File              // the library's
	broken atomic.Pointer[error] // a panic: the library may hold locks for ever, and is not asked again
}

// guard calls f and turns panics and page faults into an error wrapping errDamaged.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: %v", errDamaged, v)
		}
	}()
	return f()
}

// do is guard for what f does.
func (f *file) do(what func() error) error {
	if err := f.broken.Load(); err != nil {
		return *err
	}
	done := false
	err := guard(func() error {
		err := what()
		done = true
		return err
	})
	if !done {
		f.broken.Store(&err)
	}
	return err
}

// openFile opens or makes the file at path.
func openFile(path string, readOnly bool, now time.Time) (f *file, err error) {
	var handle *os.File
	err = guard(func() error {
		if readOnly {
			if st, err := os.Stat(path); err != nil {
				return err
			} else if st.Size() == 0 {
				return fmt.Errorf("%w: it is empty", errDamaged)
			}
		}
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{
			Timeout: lockPatience, ReadOnly: readOnly, NoStatistics: true,
			// Without its list of free pages in the file the library would look for them in
			// a goroutine, where a fault ends the process.
			NoFreelistSync: false, FreelistType: bbolt.FreelistMapType,
			OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
				handle, err = os.OpenFile(name, flag, mode)
				return handle, err
			},
		})
		if err != nil {
			return classify(err)
		}
		f = &file{db: db, handle: handle}
		return nil
	})
	if err != nil {
		if handle != nil {
			handle.Close() // the library does so too, unless it panicked
		}
		return nil, err
	}
	err = f.do(func() error {
		if readOnly {
			return f.db.View(checkFormat)
		}
		return f.db.Update(func(tx *bbolt.Tx) error { return prepare(tx, now) })
	})
	if err != nil {
		f.abandon()
		return nil, err
	}
	return f, nil
}

// classify tells errors about what the file holds from those about reaching it.
func classify(err error) error {
	for _, e := range []error{bbolterrors.ErrInvalid, bbolterrors.ErrVersionMismatch, bbolterrors.ErrChecksum, bbolterrors.ErrInvalidMapping} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", errDamaged, err)
		}
	}
	if strings.HasPrefix(err.Error(), "file size too small") { // the library has no name for it
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return err
}

// prepare makes what a new file lacks.
func prepare(tx *bbolt.Tx, now time.Time) error {
	if tx.Bucket(bucketMeta) != nil {
		return checkFormat(tx)
	}
	for _, b := range [][]byte{bucketMeta, bucketPairs, bucketRules, bucketDays} {
		if _, err := tx.CreateBucketIfNotExists(b); err != nil {
			return err
		}
	}
	meta := tx.Bucket(bucketMeta)
	return errors.Join(meta.Put(keyFormat, []byte{formatVersion}),
		meta.Put(keyBegun, binary.BigEndian.AppendUint64(nil, uint64(now.Unix()))))
}

func checkFormat(tx *bbolt.Tx) error {
	for _, b := range [][]byte{bucketMeta, bucketPairs, bucketRules, bucketDays} {
		if tx.Bucket(b) == nil {
			return fmt.Errorf("%w: %s is missing", errDamaged, b)
		}
	}
	meta := tx.Bucket(bucketMeta)
	if v := meta.Get(keyFormat); len(v) != 1 || v[0] != formatVersion {
		return fmt.Errorf("%w: format %v, and this program knows %d", errDamaged, v, formatVersion)
	}
	if len(meta.Get(keyBegun)) != 8 {
		return fmt.Errorf("%w: when it was begun is missing", errDamaged)
	}
	return nil
}

// close closes f, in good order if that is possible. After a panic the mapping, and with
// it the lock, stay as long as the process; the file has got another name by then.
func (f *file) close() error {
	if f.broken.Load() != nil {
		return f.handle.Close()
	}
	return f.do(f.db.Close)
}

// abandon closes f, which is of no use any more.
func (f *file) abandon() { _ = f.close() }

// load calls entry with every pair and use with every rule.
func (f *file) load(entry func(*entry), use func(useKey, Use)) (begun time.Time, err error) {
	err = f.do(func() error {
		return f.db.View(func(tx *bbolt.Tx) error {
			begun = time.Unix(int64(binary.BigEndian.Uint64(tx.Bucket(bucketMeta).Get(keyBegun))), 0)
			err := tx.Bucket(bucketPairs).ForEach(func(k, v []byte) error {
				v, err := unsealed(k, v)
				if err != nil || len(k) != 8 {
					return fmt.Errorf("%w: %w", errDamaged, errRecord)
				}
				e, err := readEntry(v)
				if err != nil {
					return fmt.Errorf("%w: %w", errDamaged, err)
				}
				e.id = binary.BigEndian.Uint64(k)
				entry(e)
				return nil
			})
			if err != nil {
				return err
			}
			return tx.Bucket(bucketRules).ForEach(func(k, v []byte) error {
				v, err := unsealed(k, v)
				if err != nil {
					return fmt.Errorf("%w: %w", errDamaged, err)
				}
				key, err := readUseKey(k)
				if err != nil {
					return fmt.Errorf("%w: %w", errDamaged, err)
				}
				r := reader{data: v}
				hits, last := r.number(anyNumber), r.number(1<<32-1)
				if r.bad {
					return fmt.Errorf("%w: %w", errDamaged, errRecord)
				}
				use(key, Use{hits, time.Unix(int64(last), 0).UTC()})
				return nil
			})
		})
	})
	return begun, err
}

// days calls f with the traffic of each pair on each day from since on.
func (f *file) days(since uint16, visit func(day uint16, id uint64, u usage)) error {
	return f.do(func() error {
		return f.db.View(func(tx *bbolt.Tx) error {
			c := tx.Bucket(bucketDays).Cursor()
			for k, _ := c.Seek(dayKey(since)); k != nil; k, _ = c.Next() {
				b := tx.Bucket(bucketDays).Bucket(k)
				if len(k) != 2 || b == nil {
					return fmt.Errorf("%w: %w", errDamaged, errRecord)
				}
				day := binary.BigEndian.Uint16(k)
				err := b.ForEach(func(id, v []byte) error {
					v, err := unsealed(id, v)
					if err != nil || len(id) != 8 {
						return fmt.Errorf("%w: %w", errDamaged, errRecord)
					}
					u, err := readUsage(v)
					if err != nil {
						return fmt.Errorf("%w: %w", errDamaged, err)
					}
					visit(day, binary.BigEndian.Uint64(id), u)
					return nil
				})
				if err != nil {
					return err
				}
			}
			return nil
		})
	})
}

func dayKey(day uint16) []byte { return binary.BigEndian.AppendUint16(nil, day) }

// write writes entries, which are copies with IDs, most of them newer than those before.
func (f *file) write(entries []entry) error {
	return f.do(func() error {
		return f.db.Update(func(tx *bbolt.Tx) error {
			pairs, days := tx.Bucket(bucketPairs), tx.Bucket(bucketDays)
			open := map[uint16]*bbolt.Bucket{}
			putDay := func(key []byte, u dayUsage) (err error) {
				if u.count == 0 {
					return nil
				}
				b := open[u.day]
				if b == nil {
					if b, err = days.CreateBucketIfNotExists(dayKey(u.day)); err != nil {
						return err
					}
					b.FillPercent = 0.9 // IDs grow
					open[u.day] = b
				}
				return b.Put(key, sealed(appendUsage(nil, u.usage), 0, key))
			}
			pairs.FillPercent = 0.9
			for i := range entries {
				e := &entries[i]
				key := idKey(e.id)
				err := errors.Join(pairs.Put(key, sealed(appendEntry(make([]byte, 0, 256), e), 0, key)),
					putDay(key, dayUsage{e.today, e.day}))
				if e.before != nil {
					err = errors.Join(err, putDay(key, *e.before))
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// writeUses writes the use of rules.
func (f *file) writeUses(uses map[useKey]*use) error {
	return f.do(func() error {
		return f.db.Update(func(tx *bbolt.Tx) error {
			b := tx.Bucket(bucketRules)
			for k, u := range uses {
				key := useRecordKey(k)
				v := binary.AppendUvarint(binary.AppendUvarint(nil, u.hits.Load()), uint64(u.last.Load()))
				if err := b.Put(key, sealed(v, 0, key)); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// remove removes pairs and rules.
func (f *file) remove(pairs []removal, rules []useKey) error {
	return f.do(func() error {
		return f.db.Update(func(tx *bbolt.Tx) error {
			all, days, uses := tx.Bucket(bucketPairs), tx.Bucket(bucketDays), tx.Bucket(bucketRules)
			for _, r := range pairs {
				key := idKey(r.id)
				if err := all.Delete(key); err != nil {
					return err
				}
				for _, d := range r.days {
					if b := days.Bucket(dayKey(d)); d != 0 && b != nil {
						if err := b.Delete(key); err != nil {
							return err
						}
					}
				}
			}
			for _, k := range rules {
				if err := uses.Delete(useRecordKey(k)); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// tidy removes the days before day.
func (f *file) tidy(day uint16) error {
	return f.do(func() error {
		return f.db.Update(func(tx *bbolt.Tx) error {
			days := tx.Bucket(bucketDays)
			var old [][]byte
			c := days.Cursor()
			for k, _ := c.First(); k != nil && string(k) < string(dayKey(day)); k, _ = c.Next() {
				old = append(old, append([]byte(nil), k...))
			}
			for _, k := range old {
				if err := days.DeleteBucket(k); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// setAside renames what is at path, so that a new file can be begun there.
func setAside(path string, now time.Time) (string, error) {
	base := path + ".damaged-" + now.UTC().Format("20060102T150405Z")
	to := base
	for i := 2; ; i++ {
		if _, err := os.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			return to, os.Rename(path, to)
		} else if err != nil || i > 100 {
			return "", fmt.Errorf("%s: too many files like it", base)
		}
		to = fmt.Sprintf("%s-%d", base, i)
	}
}
