package replay

import (
	"errors"
	"strconv"
	"time"
)

var errTime = errors.New("no time that can be read")

// readTime returns when the request began.
func readTime(rec *record) (time.Time, bool) {
	if rec.ended {
		n := len(rec.time)
		s, err := strconv.ParseInt(string(rec.time[:n-4]), 10, 64)
		ms, err2 := strconv.ParseUint(string(rec.time[n-3:]), 10, 16)
		ago := min(rec.millis, 1<<40)
		return time.UnixMilli(s*1000 + int64(ms) - int64(ago)).UTC(), err == nil && err2 == nil
	}
	if t, ok := plainTime(rec.time); ok {
		return t, true
	}
	t, err := time.Parse(time.RFC3339Nano, string(rec.time))
	return t, err == nil
}

// plainTime reads 2026-03-04T05:06:07.089Z, as the gate writes it.
func plainTime(b []byte) (t time.Time, ok bool) {
	if len(b) != 24 || b[4] != '-' || b[7] != '-' || b[10] != 'T' || b[13] != ':' || b[16] != ':' || b[19] != '.' || b[23] != 'Z' {
		return t, false
	}
	ok = true
	number := func(i, j int) (n int) {
		for _, c := range b[i:j] {
			ok = ok && c >= '0' && c <= '9'
			n = n*10 + int(c-'0')
		}
		return n
	}
	year, month, day := number(0, 4), number(5, 7), number(8, 10)
	hour, minute, second, ms := number(11, 13), number(14, 16), number(17, 19), number(20, 23)
	// Days that a month does not have are left to time.Parse, which refuses them.
	if !ok || month < 1 || month > 12 || day < 1 || day > 28 || hour > 23 || minute > 59 || second > 59 {
		return t, false
	}
	return time.Date(year, time.Month(month), day, hour, minute, second, ms*1e6, time.UTC), true
}
